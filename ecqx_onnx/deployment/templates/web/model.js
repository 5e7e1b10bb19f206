// manifest.json and the files it names -> a model that predicts, checks itself against its golden outputs, and times itself.
// Nothing here touches the page: `read(name)` gives a file's bytes, `ort` is onnxruntime-web.

import { preprocess } from './preprocessing.js';

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, int16: Int16Array, int8: Int8Array,
  uint64: BigUint64Array, uint32: Uint32Array, uint16: Uint16Array, uint8: Uint8Array, bool: Uint8Array, float16: Uint16Array,
};

/** The bytes of a file that the manifest names. Throws if they were changed: a runtime may load damaged weights without a word. */
async function whole(read, { file, sha256, bytes }) {
  const content = await read(file);
  if (content.length !== bytes) throw new Error(`${file} has ${content.length} bytes, not ${bytes}: deploy it again`);
  const found = await digest(content);
  if (found !== null && found !== sha256) throw new Error(`${file} was changed: its sha256 is not the manifest's; deploy it again`);
  return content;
}

/** Some servers send their start page for files that they do not have. */
function parse(bytes) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new Error('manifest.json is no JSON: serve the folder as it was written');
  }
}

const SHORTEST = 2; // milliseconds: browsers' clocks are coarse, so faster models run several times per measurement

export class Model {
  /** providers: of onnxruntime-web, the first that can run an operator runs it. */
  static async open(read, ort, providers = ['wasm']) {
    const manifest = parse(await read('manifest.json'));
    const bytes = await whole(read, manifest.model);
    const externalData = await Promise.all(manifest.external.map(async (entry) => ({ path: entry.file, data: await whole(read, entry) })));
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = 'error';
    const create = () => ort.InferenceSession.create(bytes, { executionProviders: providers, externalData });
    const start = performance.now();
    const session = await create();
    const model = new Model();
    Object.assign(model, { read, ort, manifest, bytes, create, session, loadMilliseconds: performance.now() - start });
    model.fixedBatch = typeof manifest.inputs[0].shape[0] === 'number' ? manifest.inputs[0].shape[0] : null;
    return model;
  }

  /** Milliseconds that loading takes once the runtime is there. */
  async reload() {
    const start = performance.now();
    const again = await this.create();
    const taken = performance.now() - start;
    await again.release();
    return taken;
  }

  /** feeds: {name: {data, shape}} -> outputs in the order of the manifest: [{name, data, shape}]. */
  async run(feeds) {
    const tensors = {};
    for (const { name, dtype } of this.manifest.inputs) tensors[name] = new this.ort.Tensor(dtype, feeds[name].data, feeds[name].shape);
    const outputs = await this.session.run(tensors);
    return this.manifest.outputs.map(({ name }) => ({ name, data: outputs[name].data, shape: outputs[name].dims }));
  }

  /** One raw sample, of the shape that manifest.raw gives -> the model's input. A graph with a fixed batch gets copies of it. */
  prepare(raw) {
    const count = this.fixedBatch ?? 1;
    const batch = new raw.constructor(raw.length * count);
    for (let i = 0; i < count; i++) batch.set(raw, i * raw.length);
    return preprocess(batch, [count, ...this.manifest.raw.shape], this.manifest.preprocessing);
  }

  async predict(raw) {
    return this.run({ [this.manifest.inputs[0].name]: this.prepare(raw) });
  }

  /** An entry of the manifest -> {data, shape}. Throws if the file was changed. */
  async load({ file, dtype, shape, sha256 }) {
    const bytes = await this.read(file);
    const found = await digest(bytes);
    if (found !== null && found !== sha256) throw new Error(`${file} was changed: its sha256 is not the manifest's`);
    return { data: new ARRAYS[dtype](bytes.slice().buffer), shape };
  }

  /** -> {ok, checks: [{name, ok, sentence}]}; ok is null where something could not be asked. */
  async selfCheck() {
    const checks = [];
    const add = async (name, check) => {
      try {
        checks.push({ name, ...(await check()) });
      } catch (error) {
        checks.push({ name, ok: false, sentence: error.message ?? String(error) });
      }
    };
    await add('file', () => this.checkFile());
    if (this.manifest.preprocessing && this.manifest.raw) await add('preprocessing', () => this.checkPreprocessing());
    await add('outputs', () => this.checkOutputs(false));
    if (this.manifest.preprocessing && this.manifest.raw) await add('raw to output', () => this.checkOutputs(true));
    return { ok: checks.every((check) => check.ok !== false), checks };
  }

  async checkFile() {
    const { sha256, bytes } = this.manifest.model;
    const found = await digest(this.bytes);
    if (this.bytes.length !== bytes) return { ok: false, sentence: `the model has ${this.bytes.length} bytes, not ${bytes}` };
    if (found === null) return { ok: null, sentence: 'checksums need https or localhost' };
    return { ok: found === sha256, sentence: found === sha256 ? 'the model is the one that was deployed' : 'the model was changed' };
  }

  async checkPreprocessing() {
    let worst = 0;
    for (const { raw, inputs } of this.manifest.golden.cases) {
      const [from, wanted] = [await this.load(raw), await this.load(inputs[0])];
      worst = Math.max(worst, difference(preprocess(from.data, from.shape, this.manifest.preprocessing), wanted));
    }
    const limit = this.manifest.golden.preprocessing_tolerance;
    return { ok: worst <= limit, sentence: judged('inputs', worst, limit) };
  }

  async checkOutputs(fromRaw) {
    const { cases } = this.manifest.golden;
    let [sentence, ok, same, total] = ['', true, 0, 0];
    const worst = this.manifest.outputs.map(() => 0);
    for (const { raw, inputs, outputs } of cases) {
      const feeds = {};
      for (const entry of inputs) feeds[entry.name] = await this.load(entry);
      if (fromRaw) {
        const { data, shape } = await this.load(raw);
        feeds[inputs[0].name] = preprocess(data, shape, this.manifest.preprocessing);
      }
      const found = await this.run(feeds);
      for (const [i, entry] of outputs.entries()) {
        const wanted = await this.load(entry);
        worst[i] = Math.max(worst[i], difference(found[i], wanted));
        if (i === 0 && isClasses(wanted.shape)) {
          const [a, b] = [rows(found[i]).map(best), rows(wanted).map(best)];
          same += a.filter((value, row) => value === b[row]).length;
          total += a.length;
        }
      }
    }
    for (const [i, { name, tolerance, raw_tolerance }] of this.manifest.outputs.entries()) {
      const limit = fromRaw ? raw_tolerance : tolerance;
      if (worst[i] <= limit && sentence) continue;
      ok &&= worst[i] <= limit;
      sentence = judged(worst.length > 1 ? `'${name}'` : 'outputs', worst[i], limit);
    }
    return { ok, sentence: total ? `same class for ${same} of ${total}, ${sentence}` : sentence, same, total };
  }

  /** Median milliseconds of one inference. */
  async latency(feeds, runs = 15) {
    const time = async (count) => {
      const start = performance.now();
      for (let i = 0; i < count; i++) await this.run(feeds);
      return (performance.now() - start) / count;
    };
    const first = Math.max(0.01, await time(3));
    const inner = Math.max(1, Math.round(SHORTEST / first));
    const times = [];
    const end = performance.now() + 1500;
    while (times.length < runs && (times.length < 3 || performance.now() < end)) times.push(await time(inner));
    return times.sort((a, b) => a - b)[times.length >> 1];
  }
}

const judged = (what, worst, limit) =>
  `largest difference of ${what} ${show(worst)}, allowed ${show(limit)}`;
const show = (value) => (value === 0 ? '0' : Number.isFinite(value) ? value.toExponential(1) : 'without bound');

async function digest(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  return [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))].map((b) => b.toString(16).padStart(2, '0')).join('');
}

/** max |a - b|; infinite for other shapes and for what is no number. */
export function difference(a, b) {
  if (a.shape.join() !== b.shape.join()) return Infinity;
  let worst = 0;
  for (let i = 0; i < b.data.length; i++) {
    const delta = Math.abs(Number(a.data[i]) - Number(b.data[i]));
    worst = Math.max(worst, Number.isNaN(delta) ? Infinity : delta);
  }
  return worst;
}

/** Scores [N, C] of C >= 2 classes? */
export const isClasses = (shape) => shape.length === 2 && shape[1] >= 2;
export const rows = ({ data, shape }) =>
  Array.from({ length: shape[0] }, (_, i) => Array.from(data.subarray(i * shape[1], (i + 1) * shape[1]), Number));
export const best = (scores) => scores.indexOf(Math.max(...scores));

/** Scores of one sample -> probabilities: as they are if they are some already, else their softmax. */
export function probabilities(scores) {
  const sum = scores.reduce((a, b) => a + b, 0);
  if (scores.every((score) => score >= 0) && Math.abs(sum - 1) < 1e-3) return scores;
  const highest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - highest));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}
