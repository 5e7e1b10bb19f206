// The page: shows what the manifest says, takes an input, shows the prediction, and runs the self-check once the model is loaded.

import * as ort from './runtime/ort.wasm.min.mjs';
import { drawingToRaw, imageToRaw, paint, readImage, readSound, record } from './inputs.js';
import { Model, isClasses, probabilities, rows } from './model.js';

const SHOWN = 5; // classes
const SMALL = 64; // pixels: grey inputs up to this size can be drawn
const $ = (id) => document.getElementById(id);
const read = async (name) => {
  const answer = await fetch(new URL(name, document.baseURI));
  if (!answer.ok) throw new Error(`${name} cannot be fetched (${answer.status}); serve the folder as it was written`);
  return new Uint8Array(await answer.arrayBuffer());
};

let model = null;
let lastImage = null; // of a file, so that inverting needs no second choice
let newest = 0; // number of the newest request: answers to older ones are dropped

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
  $('subtitle').textContent = [bits ? `weights of ${bits} bits` : '', bytes(size), 'runs in this page'].filter(Boolean).join(' · ');
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
    $('values').textContent = outputs
      .map(({ name, data }) => `${name}: ${Array.from(data.subarray(0, 16), (value) => Number(value).toPrecision(5)).join('  ')}${data.length > 16 ? ' …' : ''}`)
      .join('\n');
    return;
  }
  const shares = probabilities(rows(outputs[0])[0]);
  const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, SHOWN);
  $('answer').textContent = label(order[0]);
  $('bars').replaceChildren(...order.map((i) => bar(label(i), shares[i])));
}

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

function fail(error) {
  $('failure').textContent = error.message ?? String(error);
  $('failure').hidden = false;
}

/** Anything that gives a raw sample (or null for none) -> the prediction on the page. */
async function predict(source, truth) {
  const request = ++newest;
  $('failure').hidden = true;
  try {
    const raw = await source();
    if (raw === null || request !== newest) return;
    const start = performance.now();
    const outputs = await model.predict(raw);
    if (request === newest) showResult(outputs, performance.now() - start, raw, truth);
  } catch (error) {
    fail(error);
  }
}

function takeFile(file) {
  if (!file) return;
  if (model.manifest.preprocessing.kind === 'waveform') {
    void predict(() => readSound(file, model.manifest));
    return;
  }
  void predict(async () => {
    lastImage = await readImage(file);
    return imageToRaw(lastImage, model.manifest, $('invert').checked);
  });
}

function setUpInput() {
  const { preprocessing, raw } = model.manifest;
  const kind = raw ? preprocessing?.kind : null;
  if (kind === 'image') {
    const [height, width, channels = 1] = raw.shape;
    $('drop-note').textContent = `becomes ${width} × ${height}${channels === 1 ? ', grey' : ''}`;
    $('file').accept = 'image/*';
    $('invert-row').hidden = channels !== 1;
    if (channels === 1 && height <= SMALL && width <= SMALL) setUpDrawing();
    else showMode('file');
  } else if (kind === 'waveform') {
    $('drop-title').textContent = 'Drop a sound here, or choose one';
    const seconds = preprocessing.spectrum ? `first ${(raw.shape[0] / preprocessing.spectrum.sample_rate).toPrecision(2)} s at ${preprocessing.spectrum.sample_rate} Hz` : `first ${raw.shape[0]} samples`;
    $('drop-note').textContent = seconds;
    $('file').accept = 'audio/*';
    showMode('file');
    setUpRecording(raw.shape[0] / (preprocessing.spectrum?.sample_rate ?? 16000));
  }
  if (kind !== 'image' && kind !== 'waveform') {
    const wanted = model.manifest.inputs.map(({ name, dtype, shape }) => `${name}: ${dtype} [${shape.map((n) => n ?? 'N').join(', ')}]`);
    $('no-input').textContent = `This model takes neither images nor sounds, but ${wanted.join('; ')}. Try an example.`;
    $('no-input').hidden = false;
  }
  const [drop, file] = [$('drop'), $('file')];
  file.addEventListener('change', () => { takeFile(file.files[0]); file.value = ''; });
  $('invert').addEventListener('change', () => lastImage && void predict(async () => imageToRaw(lastImage, model.manifest, $('invert').checked)));
  // A file dropped beside the box must not replace the page.
  for (const type of ['dragover', 'drop']) addEventListener(type, (event) => event.preventDefault());
  addEventListener('dragover', () => drop.classList.add('over'));
  for (const type of ['dragleave', 'drop']) addEventListener(type, () => drop.classList.remove('over'));
  addEventListener('drop', (event) => !drop.hidden && takeFile(event.dataTransfer.files[0]));
  addEventListener('paste', (event) => !drop.hidden && takeFile(event.clipboardData.files[0]));
}

function setUpRecording(seconds) {
  const button = $('record');
  button.hidden = !(navigator.mediaDevices && globalThis.MediaRecorder); // browsers give pages no microphone on plain http
  button.textContent = `Record ${seconds.toPrecision(2)} s`;
  button.addEventListener('click', async () => {
    Object.assign(button, { disabled: true, ariaPressed: 'true' });
    try {
      takeFile(await record(1000 * seconds + 200)); // recorders need a moment to begin
    } catch (error) {
      fail(new Error(`nothing was recorded: ${error.message}`));
    }
    Object.assign(button, { disabled: false, ariaPressed: 'false' });
  });
}

function showMode(mode) {
  $('draw').hidden = mode !== 'draw';
  $('drop').hidden = mode !== 'file';
  $('invert-row').hidden = mode !== 'file' || model.manifest.preprocessing.kind !== 'image' || (model.manifest.raw.shape[2] ?? 1) !== 1;
  $('mode-draw').ariaPressed = String(mode === 'draw');
  $('mode-file').ariaPressed = String(mode === 'file');
}

function setUpDrawing() {
  $('modes').hidden = false;
  $('mode-draw').addEventListener('click', () => showMode('draw'));
  $('mode-file').addEventListener('click', () => showMode('file'));
  showMode('draw');
  const pad = $('pad');
  const pen = pad.getContext('2d', { willReadFrequently: true });
  const clear = () => {
    pen.fillStyle = '#000';
    pen.fillRect(0, 0, pad.width, pad.height);
  };
  Object.assign(pen, { strokeStyle: '#fff', lineWidth: 22, lineCap: 'round', lineJoin: 'round' });
  clear();
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
  };
  let from = null;
  const stroke = (event) => {
    const to = place(event);
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
    from = to;
  };
  pad.addEventListener('pointerdown', (event) => {
    pad.setPointerCapture(event.pointerId);
    from = place(event);
    $('hint').hidden = true;
    stroke(event);
  });
  pad.addEventListener('pointermove', (event) => from && stroke(event));
  const end = () => {
    if (from) void predict(async () => drawingToRaw(pad, model.manifest));
    from = null;
  };
  pad.addEventListener('pointerup', end);
  pad.addEventListener('pointercancel', end);
  $('clear').addEventListener('click', () => {
    clear();
    $('hint').hidden = false;
    newest++;
    $('result').hidden = true;
    $('waiting').hidden = false;
  });
}

async function setUpExamples() {
  const { golden, preprocessing } = model.manifest;
  const items = await Promise.all(
    golden.cases.map(async ({ raw, inputs, labels }, number) => {
      const truth = labels?.[0];
      const words = truth === undefined ? `example ${number + 1}` : `example labelled ${label(truth)}`;
      const button = element('button', { type: 'button', title: words, ariaLabel: words });
      if (raw && preprocessing) {
        const { data, shape } = await model.load(raw);
        const first = data.slice(0, data.length / shape[0]);
        if (preprocessing.kind === 'image') button.append(element('canvas', {}));
        else Object.assign(button, { className: 'text', textContent: truth === undefined ? `${number + 1}` : label(truth) });
        if (preprocessing.kind === 'image') paint(button.firstChild, first, model.manifest);
        button.addEventListener('click', () => void predict(async () => first, truth));
      } else {
        Object.assign(button, { className: 'text', textContent: truth === undefined ? words : label(truth) });
        button.addEventListener('click', () => void predictGolden(inputs, truth));
      }
      return element('li', {}, button);
    }),
  );
  $('thumbnails').replaceChildren(...items);
  // Made-up pictures and sounds are noise, which is of use to the self-check only.
  const noise = ['image', 'waveform'].includes(preprocessing?.kind) && !golden.cases.some(({ labels }) => labels.length);
  $('examples').hidden = items.length === 0 || noise;
}

async function feedsOf(inputs) {
  return Object.fromEntries(await Promise.all(inputs.map(async (entry) => [entry.name, await model.load(entry)])));
}

async function predictGolden(inputs, truth) {
  const feeds = await feedsOf(inputs);
  const start = performance.now();
  const outputs = await model.run(feeds);
  showResult(outputs, performance.now() - start, null, truth);
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
  $('verdict').className = ok ? 'ok' : 'bad';
  $('verdict').textContent = ok
    ? '✓ This browser computes what onnxruntime computed when the folder was made.'
    : '✗ This browser does NOT compute what onnxruntime computed when the folder was made.';
  document.documentElement.dataset.check = ok ? 'passed' : 'failed';
}

async function start() {
  model = await Model.open(read, ort);
  showFacts(model.manifest);
  $('load').textContent = milliseconds(await model.reload());
  $('load-note').textContent = `model only; the first time ${milliseconds(model.loadMilliseconds)}, with the runtime`;
  setUpInput();
  const check = await model.selfCheck();
  showCheck(check);
  await setUpExamples();
  $('latency').textContent = milliseconds(await model.latency(await feedsOf(model.manifest.golden.cases[0].inputs)));
  document.documentElement.dataset.state = 'ready';
}

start().catch((error) => {
  fail(error);
  $('verdict').textContent = 'could not run';
  $('verdict').className = 'bad';
  document.documentElement.dataset.state = 'failed';
});
