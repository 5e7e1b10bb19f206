// The page: shows what the manifest says, takes an input, shows the prediction, and runs the
// self-check once the model is loaded. start.js calls start().

import { Pad } from './drawing.js';
import { fetchBytes, PATIENCE, within } from './fetching.js';
import { borderLightness, drawingToRaw, imageToRaw, paint, readImage, readSound } from './inputs.js';
import { Camera, hasCamera, hasMicrophone, record } from './media.js';
import { isClasses, Model, probabilities, rows } from './model.js';
import { checkWebAssembly, findAdapter, loadRuntime } from './runtime.js';

const SHOWN = 5; // classes
const SMALL = 64; // pixels: grey inputs up to this size can be drawn
const START_LIMIT = 150; // seconds for the runtime and the model to start once they are there
const CAMERA_PAUSE = 80; // milliseconds between two pictures, so that the page stays quick
const WORTH_A_GPU = 20; // milliseconds of an inference, below which a GPU's own start takes longer
const $ = (id) => document.getElementById(id);

let model = null;
let camera = null;
let lastImage = null; // of a file, so that inverting needs no second choice
let newest = 0; // number of the newest request: answers to older ones are dropped
let background = null; // of the pictures that the model was made for: 'dark', 'light' or unknown

function bytes(count) {
  if (count < 1000) return `${count} bytes`;
  return count < 1e6 ? `${(count / 1e3).toPrecision(3)} kB` : `${(count / 1e6).toPrecision(3)} MB`;
}
function milliseconds(value) {
  if (value >= 999.5) return `${(value / 1000).toPrecision(3)} s`;
  return value < 0.995 ? `${value.toFixed(2)} ms` : `${value.toPrecision(3)} ms`;
}
function percent(share) {
  if (share > 0.9995 && share < 1) return '> 99.9 %';
  return share > 0 && share < 0.0005 ? '< 0.1 %' : `${(100 * share).toFixed(1)} %`;
}

function showFacts({ name, model: file, external, accuracy, bits, runtime, tool }) {
  const size = external.reduce((sum, part) => sum + part.bytes, file.bytes);
  document.title = name;
  $('name').textContent = name;
  const words = [bits ? `weights of ${bits} bits` : '', bytes(size), 'runs in this page'];
  $('subtitle').textContent = words.filter(Boolean).join(' · ');
  $('size').textContent = bytes(size);
  if (file.float32_bytes > 1.05 * size) {
    $('size-note').textContent = `${(file.float32_bytes / size).toFixed(1)}× smaller than float32 (${bytes(file.float32_bytes)})`;
  }
  if (accuracy) {
    $('accuracy').textContent = `${(100 * accuracy.share).toFixed(2)} %`;
    const interval = `${(100 * accuracy.low).toFixed(2)} to ${(100 * accuracy.high).toFixed(2)}`;
    $('accuracy-note').textContent = `expected, ${interval} (95 % interval), ${accuracy.total} samples of ${accuracy.data}`;
  } else {
    $('accuracy-note').textContent = 'was not measured when this was made';
  }
  $('runtime').textContent = `${runtime} · ${tool}`;
}

// ---- the prediction ----

const label = (i) => model.manifest.labels[i] ?? `class ${i}`;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function bar(name, share) {
  return element(
    'li',
    {},
    element('span', { className: 'label', textContent: name, title: name }),
    element('progress', { max: 1, value: share, ariaHidden: 'true' }),
    element('span', { className: 'share', textContent: percent(share) }),
  );
}

function showResult(outputs, milli, raw, truth) {
  const { manifest } = model;
  $('waiting').hidden = true;
  $('result').hidden = false;
  const pictured = raw && ['image', 'waveform'].includes(manifest.preprocessing?.kind);
  $('seen-figure').hidden = !pictured;
  if (pictured) paint($('seen'), raw, manifest);
  $('truth').textContent = truth === undefined || truth === null ? '' : `labelled ${label(truth)}`;
  $('timing').textContent = `${milliseconds(milli)} for this one`;
  const classes = isClasses(outputs[0].shape);
  $('bars').hidden = !classes;
  $('values').hidden = classes;
  if (!classes) {
    $('answer').textContent = outputs.map(({ shape }) => shape.join(' × ')).join(', ');
    $('values').textContent = outputs.map(firstValues).join('\n');
    return;
  }
  const shares = probabilities(rows(outputs[0])[0]);
  const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, SHOWN);
  $('answer').textContent = label(order[0]);
  $('bars').replaceChildren(...order.map((i) => bar(label(i), shares[i])));
}

function firstValues({ name, data }) {
  const shown = Array.from(data.subarray(0, 16), (value) => Number(value).toPrecision(5));
  return `${name}: ${shown.join('  ')}${data.length > 16 ? ' …' : ''}`;
}

/** No answer of an earlier input stays beside a later one. */
function clearResult(sentence = 'Waiting for an input.') {
  $('result').hidden = true;
  $('answer').textContent = '';
  $('bars').replaceChildren();
  $('values').textContent = '';
  $('waiting').hidden = false;
  $('waiting').textContent = sentence;
}

/** Where one looks: below the input that was given. */
function showTrouble(error) {
  clearResult('No prediction for this input.');
  $('trouble').textContent = error.message ?? String(error);
  $('trouble').hidden = false;
  $('offer').hidden = true;
  $('trouble').scrollIntoView({ block: 'nearest' });
}

/** Anything that gives a raw sample (or null for none) -> the prediction on the page. */
async function predict(source, { truth, seen = () => {} } = {}) {
  const request = ++newest;
  $('trouble').hidden = true;
  $('result').classList.add('stale');
  try {
    const raw = await within(source(), PATIENCE, `the input could not be read within ${PATIENCE} s`);
    if (request !== newest) return;
    $('result').classList.remove('stale');
    if (raw === null) return;
    const start = performance.now();
    const outputs = await model.predict(raw);
    if (request !== newest) return;
    showResult(outputs, performance.now() - start, raw, truth);
    seen(raw);
  } catch (error) {
    if (request === newest) showTrouble(error);
  }
}

// ---- files ----

function takeFile(file) {
  if (!file) return;
  lastImage = null;
  $('offer').hidden = true;
  if (model.manifest.preprocessing.kind === 'waveform') {
    void predict(() => readSound(file, model.manifest));
    return;
  }
  void predict(
    async () => {
      const image = await readImage(file);
      lastImage = image;
      return imageToRaw(image, model.manifest, $('invert').checked);
    },
    { seen: offerToInvert },
  );
}

/** A drawing on white paper says little to a model that was shown light strokes on black, or the other way round. */
function offerToInvert(raw) {
  const isGrey = (model.manifest.raw.shape[2] ?? 1) === 1;
  const lightness = borderLightness(raw, model.manifest);
  const isOther = background === 'dark' ? lightness > 0.6 : background === 'light' && lightness < 0.4;
  $('offer').hidden = !(isGrey && isOther);
  const [found, wanted] = background === 'dark' ? ['dark on light', 'light on dark'] : ['light on dark', 'dark on light'];
  $('offer-words').textContent = `This looks ${found}, and the model was made for ${wanted}.`;
}

function invertLast() {
  $('offer').hidden = true;
  if (!lastImage) return;
  const image = lastImage;
  void predict(async () => imageToRaw(image, model.manifest, $('invert').checked), { seen: offerToInvert });
}

/** 'dark' or 'light', by the labelled examples, else by the mean that the preprocessing subtracts. */
function findBackground(examples) {
  const { raw, preprocessing } = model.manifest;
  if (preprocessing?.kind !== 'image' || (raw?.shape[2] ?? 1) !== 1) return null;
  const shares = examples.map((example) => borderLightness(example, model.manifest));
  if (shares.length) {
    const mean = shares.reduce((a, b) => a + b, 0) / shares.length;
    if (mean < 0.35) return 'dark';
    return mean > 0.65 ? 'light' : null;
  }
  const mean = preprocessing.mean?.[0];
  return mean > 0.65 ? 'light' : 'dark'; // what most small grey data sets are
}

// ---- inputs ----

function setUpInput() {
  const { preprocessing, raw, inputs } = model.manifest;
  const kind = raw ? preprocessing?.kind : null;
  if (kind === 'image') setUpImages(raw.shape);
  else if (kind === 'waveform') setUpSounds(raw.shape[0], preprocessing.spectrum);
  else {
    const wanted = inputs.map(({ name, dtype, shape }) => `${name}: ${dtype} [${shape.map((n) => n ?? 'N').join(', ')}]`);
    $('no-input').textContent = `This model takes neither images nor sounds, but ${wanted.join('; ')}. Try an example.`;
    $('no-input').hidden = false;
  }
  setUpFiles();
}

function setUpImages([height, width, channels = 1]) {
  $('drop-note').textContent = `becomes ${width} × ${height}${channels === 1 ? ', grey' : ''}`;
  $('file').accept = 'image/*';
  $('mode-file').addEventListener('click', () => showMode('file'));
  const canBeDrawn = channels === 1 && height <= SMALL && width <= SMALL;
  if (canBeDrawn) setUpDrawing();
  if (hasCamera()) setUpCamera();
  else tellOfMedia('The camera needs https or localhost.');
  $('modes').hidden = !canBeDrawn && !hasCamera();
  showMode(canBeDrawn ? 'draw' : 'file');
}

function setUpSounds(samples, spectrum) {
  const seconds = samples / (spectrum?.sample_rate ?? 16000);
  $('drop-title').textContent = 'Drop a sound here, or choose one';
  $('drop-note').textContent = spectrum
    ? `first ${seconds.toPrecision(2)} s at ${spectrum.sample_rate} Hz`
    : `first ${samples} samples`;
  $('file').accept = 'audio/*';
  $('drop').hidden = false;
  if (hasMicrophone()) setUpRecording(seconds);
  else tellOfMedia('The microphone needs https or localhost.');
}

function tellOfMedia(sentence) {
  $('media-note').textContent = sentence;
  $('media-note').hidden = false;
}

function setUpFiles() {
  const [drop, file] = [$('drop'), $('file')];
  file.addEventListener('change', () => {
    takeFile(file.files[0]);
    file.value = ''; // so that the same file can be chosen again
  });
  $('invert').addEventListener('change', invertLast);
  $('offer-invert').addEventListener('click', () => {
    $('invert').checked = !$('invert').checked;
    $('invert').focus();
    invertLast();
  });
  // A file dropped beside the box must not replace the page.
  for (const type of ['dragover', 'drop']) addEventListener(type, (event) => event.preventDefault());
  addEventListener('dragover', () => drop.classList.add('over'));
  for (const type of ['dragleave', 'drop']) addEventListener(type, () => drop.classList.remove('over'));
  addEventListener('drop', (event) => takeGiven(event.dataTransfer.files[0]));
  addEventListener('paste', (event) => takeGiven(event.clipboardData.files[0]));
}

/** A file that was dropped or pasted anywhere. */
function takeGiven(file) {
  const { kind } = model.manifest.preprocessing ?? {};
  if (!file || !model.manifest.raw || !['image', 'waveform'].includes(kind)) return;
  if (kind === 'image') showMode('file');
  takeFile(file);
}

function setUpRecording(seconds) {
  const button = $('record');
  const words = `Record ${seconds.toPrecision(2)} s`;
  button.hidden = false;
  button.textContent = words;
  button.addEventListener('click', async () => {
    Object.assign(button, { disabled: true, ariaPressed: 'true', textContent: 'Waiting for the microphone …' });
    try {
      // Recorders need a moment to begin.
      takeFile(await record(1000 * seconds + 200, () => (button.textContent = 'Recording …')));
    } catch (error) {
      showTrouble(error);
    }
    Object.assign(button, { disabled: false, ariaPressed: 'false', textContent: words });
  });
}

function showMode(mode) {
  for (const name of ['draw', 'file', 'camera']) {
    $(`mode-${name}`).ariaPressed = String(mode === name);
    $(name === 'file' ? 'drop' : name).hidden = mode !== name;
  }
  const isGrey = (model.manifest.raw.shape[2] ?? 1) === 1;
  $('invert-row').hidden = mode === 'draw' || !isGrey;
  for (const id of ['offer', 'trouble']) $(id).hidden = true;
  if (mode !== 'camera') camera?.stop();
}

function setUpDrawing() {
  $('mode-draw').hidden = false;
  $('mode-draw').addEventListener('click', () => showMode('draw'));
  const canvas = $('pad');
  const pad = new Pad(canvas, $('cursor'), {
    drawn: () => void predict(async () => drawingToRaw(canvas, model.manifest, background === 'light')),
    cleared: () => {
      $('hint').hidden = false;
      newest++;
      $('trouble').hidden = true;
      clearResult();
    },
  });
  for (const type of ['pointerdown', 'keydown']) {
    canvas.addEventListener(type, () => {
      if (pad.down) $('hint').hidden = true;
    });
  }
  $('clear').addEventListener('click', () => pad.clear());
}

function setUpCamera() {
  camera = new Camera($('video'));
  $('mode-camera').hidden = false;
  $('mode-camera').addEventListener('click', () => void watch(() => camera.start()));
  $('camera-turn').addEventListener('click', () => void watch(() => camera.turn()));
  $('camera-stop').addEventListener('click', () => showMode('file'));
  document.addEventListener('visibilitychange', () => document.hidden && camera.isOn && showMode('file'));
}

/** One prediction after the other of what the camera sees, until it is stopped. */
async function watch(begin) {
  showMode('camera');
  clearResult('Waiting for the camera: the browser may ask you.');
  try {
    const stream = await begin();
    if (stream) $('camera-turn').hidden = (await camera.count()) < 2;
    while (camera.stream === stream && stream?.active) {
      lastImage = camera.frame() ?? lastImage;
      const image = lastImage;
      if (image) await predict(async () => imageToRaw(image, model.manifest, $('invert').checked), { seen: offerToInvert });
      await new Promise((resolve) => setTimeout(resolve, CAMERA_PAUSE));
    }
  } catch (error) {
    showTrouble(error);
  }
}

// ---- examples and the self-check ----

/** The first raw sample of each golden case; null where there is none. */
function loadRaws({ golden, preprocessing }) {
  return Promise.all(
    golden.cases.map(async ({ raw }) => {
      if (!raw || !preprocessing) return null;
      const { data, shape } = await model.load(raw);
      return data.slice(0, data.length / shape[0]);
    }),
  );
}

function setUpExamples(raws) {
  const { golden, preprocessing } = model.manifest;
  const items = golden.cases.map(({ inputs, labels }, number) => {
    const truth = labels?.[0];
    const words = truth === undefined ? `example ${number + 1}` : `example labelled ${label(truth)}`;
    const button = element('button', { type: 'button', title: words, ariaLabel: words });
    const raw = raws[number];
    if (raw && preprocessing.kind === 'image') {
      button.append(element('canvas', {}));
      paint(button.firstChild, raw, model.manifest);
    } else {
      const short = raw ? `${number + 1}` : words;
      Object.assign(button, { className: 'text', textContent: truth === undefined ? short : label(truth) });
    }
    button.addEventListener('click', () => void showExample(raw, inputs, truth));
    return element('li', {}, button);
  });
  $('thumbnails').replaceChildren(...items);
  // Made-up pictures and sounds are noise, which is of use to the self-check only.
  const noise = ['image', 'waveform'].includes(preprocessing?.kind) && !golden.cases.some(({ labels }) => labels.length);
  $('examples').hidden = items.length === 0 || noise;
}

async function showExample(raw, inputs, truth) {
  if (camera?.isOn) showMode('file');
  $('offer').hidden = true;
  if (raw) await predict(async () => raw, { truth });
  else await predictGolden(inputs, truth);
  $('prediction').scrollIntoView({ block: 'nearest' });
}

async function feedsOf(inputs, of = model) {
  return Object.fromEntries(await Promise.all(inputs.map(async (entry) => [entry.name, await of.load(entry)])));
}

async function predictGolden(inputs, truth) {
  newest++;
  $('trouble').hidden = true;
  try {
    const feeds = await feedsOf(inputs);
    const start = performance.now();
    const outputs = await model.run(feeds);
    showResult(outputs, performance.now() - start, null, truth);
  } catch (error) {
    showTrouble(error);
  }
}

function showCheck({ ok, checks }) {
  const marks = new Map([[true, ['✓', 'passed']], [false, ['✗', 'failed']], [null, ['–', 'not asked']]]);
  $('checks').replaceChildren(
    ...checks.map((check) => {
      const [mark, words] = marks.get(check.ok);
      return element(
        'li',
        { className: check.ok === false ? 'bad' : '' },
        element('span', { className: 'mark', textContent: mark, role: 'img', ariaLabel: words }),
        element('span', { textContent: check.name }),
        element('span', { className: 'sentence', textContent: check.sentence }),
      );
    }),
  );
  $('check-details').hidden = false;
  $('check-details').open = !ok;
  $('verdict').className = ok ? 'ok' : 'bad';
  $('verdict').textContent = ok
    ? '✓ Self-check passed: the same outputs as when this was made.'
    : '✗ Self-check failed: this browser does NOT compute what onnxruntime computed when the folder was made.';
  document.documentElement.dataset.check = ok ? 'passed' : 'failed';
}

// ---- start ----

function showLoading(received, total) {
  const bar = $('loading');
  bar.hidden = false;
  if (total) bar.value = received / total;
  const of = total ? ` of ${bytes(total)}` : '';
  $('verdict').textContent = `Self-check: loading the runtime, ${bytes(received)}${of}`;
}

const latencyOf = async (of) => of.latency(await feedsOf(of.manifest.golden.cases[0].inputs, of));

/** Called by start.js. Throws in words where the page cannot work. */
export async function start() {
  checkWebAssembly();
  const ort = await loadRuntime('wasm', showLoading);
  $('loading').hidden = true;
  $('verdict').textContent = 'Self-check: starting the model …';
  const late = `the runtime and the model did not start within ${START_LIMIT} s; reload the page`;
  model = await within(Model.open(fetchBytes, ort), START_LIMIT, late);
  showFacts(model.manifest);
  $('load').textContent = milliseconds(await model.reload());
  $('load-note').textContent = `model only; the first time ${milliseconds(model.loadMilliseconds)}, with the runtime`;
  setUpInput();
  clearResult();
  $('verdict').textContent = 'Self-check: comparing …';
  showCheck(await model.selfCheck());
  await setUpPictures();
  const latency = await latencyOf(model);
  showLatency(latency, 'WebAssembly, one thread');
  await useWebGpu(latency);
  document.documentElement.dataset.state = 'ready';
}

/** A golden file that was lost fails the self-check, and leaves the rest of the page as it is. */
async function setUpPictures() {
  try {
    const raws = await loadRaws(model.manifest);
    const labelled = raws.filter((raw, i) => raw && model.manifest.golden.cases[i].labels?.length);
    background = findBackground(labelled);
    $('pad').classList.toggle('light', background === 'light');
    setUpExamples(raws);
  } catch {
    background = findBackground([]);
  }
}

function showLatency(latency, where) {
  $('latency').textContent = milliseconds(latency);
  $('latency-note').textContent = `one inference, median, ${where}`;
}

/** The GPU takes over where it is faster and passes the self-check. `?device=webgpu` or `=wasm` decides otherwise. */
async function useWebGpu(latency) {
  const { dataset } = document.documentElement;
  const wanted = new URLSearchParams(location.search).get('device');
  dataset.device = 'wasm';
  if (!model.manifest.webgpu || wanted === 'wasm') return;
  const adapter = await findAdapter();
  const tell = (words) => ($('latency-note').textContent += `; WebGPU ${words}`);
  if (!adapter) return void tell('is not here');
  if (wanted !== 'webgpu' && latency < WORTH_A_GPU) return void tell('would not be faster');
  try {
    const ort = await loadRuntime('webgpu');
    const open = Model.open(fetchBytes, ort, ['webgpu', 'wasm']);
    const other = await within(open, START_LIMIT, 'it did not start');
    const check = await other.selfCheck();
    if (!check.ok) return void tell(`(${adapter}) fails the self-check and is not used`);
    const itsLatency = await latencyOf(other);
    if (wanted !== 'webgpu' && itsLatency >= latency) return void tell(`(${adapter}) takes ${milliseconds(itsLatency)}`);
    model = other;
    dataset.device = 'webgpu';
    showCheck(check);
    showLatency(itsLatency, `WebGPU, ${adapter}; WebAssembly takes ${milliseconds(latency)}`);
  } catch (error) {
    tell(`does not start: ${String(error.message ?? error).slice(0, 160)}`);
  }
}
