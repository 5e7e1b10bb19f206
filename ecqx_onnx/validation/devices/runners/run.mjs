// A job (docs/devices.md) -> result and outputs, in JavaScript: one core for node and for browsers.
//
// read(name) -> Uint8Array, write(name, Uint8Array), sha256(Uint8Array) -> hex and log(text) are the host's own;
// `ort` is onnxruntime-web. In node:  node run.mjs FOLDER_OF_ONNXRUNTIME_WEB JOB_FOLDER

const VERSION = 1;
const WARM_UPS = 2;
const SHORTEST = 1e-3; // seconds: browsers' clocks are coarse, so faster models run several times per measurement
const LOADS = 3;
const TYPES = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, int16: Int16Array, int8: Int8Array,
  uint64: BigUint64Array, uint32: Uint32Array, uint16: Uint16Array, uint8: Uint8Array, bool: Uint8Array, float16: Uint16Array,
};

// onnxruntime-web does not tell its memory; every WebAssembly memory that it makes passes through here. They only grow.
const memories = [];
const Memory = WebAssembly.Memory;
WebAssembly.Memory = class extends Memory {
  constructor(descriptor) {
    super(descriptor);
    memories.push(this);
  }
};
// It prints its profile, one event a line, to the console that it finds when it starts.
let profile = null;
const print = console.log.bind(console);
console.log = (...parts) => (profile ? profile.push(parts.join(' ')) : print(...parts));
const memoryBytes = () => memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);

export async function runJob({ ort, read, write, sha256, log, platform }) {
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = 'fatal';
  const job = JSON.parse(new TextDecoder().decode(await read('job.json')));
  const result = { version: VERSION, job: job.id, runtime: `onnxruntime-web ${ort.env.versions.web}, wasm, ${platform}` };
  let stage = 'load';
  try {
    const model = await read(job.model.file);
    result.model_sha256 = await sha256(model);
    const external = await Promise.all(job.external.map(async (path) => ({ path, data: await read(path) })));
    const load = (bytes, options = {}) => ort.InferenceSession.create(bytes, {
      executionProviders: ['wasm'], externalData: external, logSeverityLevel: 4, ...options,
    });
    const feeds = async (entries) => {
      const arrays = {};
      for (const { name, file, dtype, shape } of entries) {
        const bytes = await read(file);
        const data = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
        arrays[name] = new ort.Tensor(dtype, new TYPES[dtype](data), shape);
      }
      return arrays;
    };
    const store = async (stem, session, outputs) => {
      const entries = [];
      for (const [i, name] of session.outputNames.entries()) {
        const { data, type, dims } = outputs[name];
        const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
        const file = `outputs/${stem}.${i}.bin`;
        await write(file, bytes);
        entries.push({ file, dtype: type, shape: dims, sha256: await sha256(bytes) });
      }
      return entries;
    };
    let session = await load(model);
    stage = 'run';
    const batches = [];
    for (const [number, entries] of job.batches.entries()) {
      const outputs = await session.run(await feeds(entries));
      batches.push(await store(String(number).padStart(5, '0'), session, outputs));
      if (number === 0) result.peak_memory = memoryBytes();
      log(`${number + 1}/${job.batches.length}`);
    }
    result.batches = batches;
    await session.release();
    session = await load(model, { graphOptimizationLevel: 'disabled' });
    result.plain = await store('plain', session, await session.run(await feeds(job.batches[0])));
    await session.release();
    const single = await feeds(job.single);
    result.operators = await executedOperators(await load(model, { enableProfiling: true }), single);
    const times = [];
    for (let i = 0; i < LOADS; i++) {
      const start = performance.now();
      session = await load(model);
      times.push((performance.now() - start) / 1e3);
      await session.release();
    }
    result.load_seconds = median(times);
    result.latency = await latency(job, single, load, model, job.twin && (await read(job.twin.file)));
  } catch (error) {
    result.error = { stage, message: message(error) };
  }
  await write('result.json', new TextEncoder().encode(JSON.stringify(result)));
}

async function executedOperators(session, feeds) {
  profile = [];
  await session.run(feeds);
  session.endProfiling();
  const lines = profile.join('\n').split('\n');
  profile = null;
  await session.release();
  const counts = {};
  for (const line of lines) {
    const match = /"cat" : "Node".*"op_name" : "([^"]+)"/.exec(line);
    if (match) counts[match[1]] = (counts[match[1]] ?? 0) + 1;
  }
  return lines.some((line) => line.includes('"cat" : "Session"')) ? counts : null;
}

async function latency(job, feeds, load, model, twin) {
  if (!job.latency_runs) return null;
  const sessions = [await load(model)];
  if (twin) sessions.push(await load(twin, { externalData: [] }));
  const seconds = async (session, count) => {
    const start = performance.now();
    for (let i = 0; i < count; i++) await session.run(feeds);
    return (performance.now() - start) / 1e3 / count;
  };
  let fastest = Infinity;
  for (const session of sessions) {
    await seconds(session, WARM_UPS);
    fastest = Math.min(fastest, await seconds(session, 5));
  }
  const inner = Math.max(1, Math.round(SHORTEST / Math.max(1e-5, fastest)));
  const times = [];
  const end = performance.now() + 1e3 * job.latency_seconds;
  while (times.length < job.latency_runs && (times.length === 0 || performance.now() < end)) {
    const pair = [];
    const order = times.length % 2 ? [...sessions.keys()].reverse() : [...sessions.keys()];
    for (const i of order) pair[i] = await seconds(sessions[i], inner);
    times.push(pair);
  }
  const found = { seconds: median(times.map((pair) => pair[0])), runs: times.length };
  if (twin) {
    found.float_seconds = median(times.map((pair) => pair[1]));
    found.ratio = median(times.map((pair) => pair[0] / pair[1]));
  }
  return found;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

function message(error) {
  const text = error instanceof Error ? error.message : typeof error === 'number' ? `WebAssembly exception ${error}` : String(error);
  return text.replace(/\s+/g, ' ').slice(0, 1000) || 'no reason given';
}

if (typeof process !== 'undefined' && process.versions?.node) {
  const fs = await import('node:fs');
  const path = await import('node:path');
  const { createHash } = await import('node:crypto');
  const { pathToFileURL } = await import('node:url');
  // In node, a threaded WebAssembly program prints past the console.
  const writeSync = fs.default.writeSync;
  fs.default.writeSync = (fd, text, ...rest) => (profile && fd === 1 ? profile.push(String(text)) : writeSync(fd, text, ...rest));
  const [runtime, folder] = process.argv.slice(2).map((name) => path.resolve(name));
  fs.mkdirSync(path.join(folder, 'outputs'), { recursive: true });
  const ort = await import(pathToFileURL(path.join(runtime, 'ort.wasm.min.mjs')));
  ort.env.wasm.wasmPaths = pathToFileURL(runtime).href + '/';
  await runJob({
    ort,
    platform: `node ${process.versions.node}`,
    read: async (name) => new Uint8Array(fs.readFileSync(path.join(folder, name))),
    write: async (name, bytes) => fs.writeFileSync(path.join(folder, name), bytes),
    sha256: async (bytes) => createHash('sha256').update(bytes).digest('hex'),
    log: (text) => process.stdout.write(`${text}\n`),
  });
}
