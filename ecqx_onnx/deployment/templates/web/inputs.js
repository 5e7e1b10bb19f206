// A file, a sound or strokes of a pen -> one raw sample of the shape that the manifest gives, as preprocessing.js takes it.

import { fitImage } from './preprocessing.js';

const LARGEST = 100e6; // pixels

/** File -> {data, width, height} as people see it: turned as its EXIF data say, transparent places white. */
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: 'from-image', premultiplyAlpha: 'none', colorSpaceConversion: 'none' });
  } catch {
    throw new Error(`'${file.name}' is no image that this browser can read`);
  }
  const { width, height } = bitmap;
  if (width * height > LARGEST) throw new Error(`'${file.name}' has ${width} x ${height} pixels; make it smaller`);
  const context = Object.assign(document.createElement('canvas'), { width, height }).getContext('2d', { willReadFrequently: true });
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height);
}

const imageShape = ([height, width, channels = 1]) => [height, width, channels];

/** Data whose scale is below 255 (say 16 grey levels) gets the image's 256 levels spread over its own. */
export function imageToRaw({ data, width, height }, manifest, invert) {
  const raw = fitImage({ pixels: data, width, height }, imageShape(manifest.raw.shape));
  const levels = manifest.preprocessing.scale;
  if (invert) for (let i = 0; i < raw.length; i++) raw[i] = 255 - raw[i];
  if (levels > 1 && levels < 255) for (let i = 0; i < raw.length; i++) raw[i] = Math.round((raw[i] * levels) / 255);
  return raw;
}

/** Light strokes on black, placed as MNIST places its digits: the longest side 20 of 28 pixels, the centre of mass in the middle. */
export function drawingToRaw(canvas, manifest, invert = false) {
  const [height, width] = manifest.raw.shape;
  const ink = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const box = bounds(ink);
  if (!box) return null;
  const small = Math.min(height, width) < 16; // nets for such small pictures are shown digits that fill them
  const side = Math.max(box.width, box.height);
  const scale = (small ? Math.min(height, width) : (Math.min(height, width) * 20) / 28) / side;
  let [x, y] = [width / 2 - (box.left + box.width / 2) * scale, height / 2 - (box.top + box.height / 2) * scale];
  if (!small) [x, y] = [width / 2 - (box.massX + 0.5) * scale, height / 2 - (box.massY + 0.5) * scale];
  // Drawn large first: fitImage then averages all of it, where the canvas's own reduction would skip pixels.
  const zoom = Math.max(1, Math.round(1 / scale));
  const large = Object.assign(document.createElement('canvas'), { width: width * zoom, height: height * zoom });
  const context = large.getContext('2d');
  context.fillRect(0, 0, large.width, large.height);
  context.setTransform(scale * zoom, 0, 0, scale * zoom, x * zoom, y * zoom);
  context.drawImage(canvas, 0, 0);
  return imageToRaw(context.getImageData(0, 0, large.width, large.height), manifest, invert);
}

/** Mean of the outermost pixels, from 0 (black) to 1 (white): what a drawing's background is. */
export function borderLightness(raw, manifest) {
  const [height, width, channels] = imageShape(manifest.raw.shape);
  const levels = manifest.preprocessing.scale > 1 ? Math.min(255, manifest.preprocessing.scale) : 255;
  let [sum, count] = [0, 0];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (x > 0 && y > 0 && x < width - 1 && y < height - 1) continue;
      for (let c = 0; c < channels; c++) sum += raw[(y * width + x) * channels + c];
      count += channels;
    }
  }
  return sum / count / levels;
}

function bounds({ data, width, height }) {
  let [left, right, top, bottom, mass, massX, massY] = [width, -1, height, -1, 0, 0, 0];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const value = data[4 * (y * width + x)];
      if (value < 32) continue;
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
      [mass, massX, massY] = [mass + value, massX + value * x, massY + value * y];
    }
  }
  if (!mass) return null;
  return { left, top, width: right - left + 1, height: bottom - top + 1, massX: massX / mass, massY: massY / mass };
}

/** File -> int16 samples of the wanted number, cut or filled with zeros at the end; resampled where the rate is another. */
export async function readSound(file, manifest) {
  const bytes = await file.arrayBuffer();
  const rate = manifest.preprocessing.spectrum?.sample_rate ?? null;
  const samples = plainWav(bytes, rate) ?? (await decoded(file, bytes, rate ?? 16000));
  const raw = new Int16Array(manifest.raw.shape[0]);
  raw.set(samples.subarray(0, raw.length));
  return raw;
}

const [PCM, FLOAT, EXTENSIBLE] = [1, 3, 0xfffe];
const WIDTHS = { [PCM]: [8, 16, 24, 32], [FLOAT]: [32, 64] }; // bits

/** The samples of a WAV of the wanted rate as the Python tool reads them, bit for bit; null for anything else. */
function plainWav(buffer, rate) {
  const view = new DataView(buffer);
  const text = (at) => (at + 4 <= view.byteLength ? String.fromCharCode(...new Uint8Array(buffer, at, 4)) : '');
  if (text(0) !== 'RIFF' || text(8) !== 'WAVE') return null;
  let format = null;
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const [name, size] = [text(at), view.getUint32(at + 4, true)];
    if (name === 'fmt ' && size >= 16 && at + 24 <= view.byteLength) {
      format = wavFormat(new DataView(buffer, at + 8, Math.min(size, view.byteLength - at - 8)));
    } else if (name === 'data') {
      if (!format || (rate !== null && format.rate !== rate)) return null;
      return wavSamples(new DataView(buffer, at + 8, Math.min(size, view.byteLength - at - 8)), format);
    }
    at += 8 + size + (size % 2);
  }
  return null;
}

/** null for what is neither PCM nor floats of a width that the Python tool reads. */
function wavFormat(chunk) {
  const word = (at) => chunk.getUint16(at, true);
  const kind = word(0) === EXTENSIBLE && chunk.byteLength >= 26 ? word(24) : word(0);
  const [channels, rate, block, bits] = [word(2), chunk.getUint32(4, true), word(12), word(14)];
  const fits = WIDTHS[kind]?.includes(bits) && channels >= 1 && channels <= 64 && block === (channels * bits) / 8;
  return fits ? { kind, channels, rate, block, bits } : null;
}

/** round(32768 · mean over channels), halves upwards, clipped: Int16Array. */
function wavSamples(view, { kind, channels, block, bits }) {
  const read = {
    8: (at) => (view.getUint8(at) - 128) / 128,
    16: (at) => view.getInt16(at, true) / 2 ** 15,
    24: (at) => (view.getUint16(at, true) + view.getInt8(at + 2) * 65536) / 2 ** 23,
    32: (at) => (kind === FLOAT ? view.getFloat32(at, true) : view.getInt32(at, true) / 2 ** 31),
    64: (at) => view.getFloat64(at, true),
  }[bits];
  return Int16Array.from({ length: Math.floor(view.byteLength / block) }, (_, i) => {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += read(i * block + (c * bits) / 8);
    if (!Number.isFinite(sum)) throw new Error('the sound holds NaN or infinity');
    return Math.max(-32768, Math.min(32767, Math.floor((sum / channels) * 32768 + 0.5)));
  });
}

async function decoded(file, bytes, rate) {
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  } catch {
    throw new Error(`'${file.name}' is no sound that this browser can read`);
  }
  const mixed = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++) buffer.getChannelData(c).forEach((value, i) => (mixed[i] += value / buffer.numberOfChannels));
  return Int16Array.from(mixed, (value) => Math.max(-32768, Math.min(32767, Math.round(value * 32768))));
}

/** A raw sample as a small picture: pixels, or the outline of a waveform. */
export function paint(canvas, raw, manifest) {
  const context = canvas.getContext('2d');
  if (manifest.preprocessing.kind === 'waveform') {
    Object.assign(canvas, { width: 168, height: 168 });
    context.strokeStyle = '#7cc5b2';
    context.lineWidth = 2;
    const peak = raw.reduce((a, b) => Math.max(a, Math.abs(b)), 1);
    for (let x = 0; x < 168; x += 3) {
      const part = raw.subarray(Math.floor((x * raw.length) / 168), Math.floor(((x + 3) * raw.length) / 168));
      const height = (part.reduce((a, b) => Math.max(a, Math.abs(b)), 0) / peak) * 76 + 1;
      context.beginPath();
      context.moveTo(x + 1.5, 84 - height);
      context.lineTo(x + 1.5, 84 + height);
      context.stroke();
    }
    return;
  }
  const [height, width, channels] = imageShape(manifest.raw.shape);
  Object.assign(canvas, { width, height });
  const image = context.createImageData(width, height);
  const bright = manifest.preprocessing.scale > 1 && manifest.preprocessing.scale < 255 ? 255 / manifest.preprocessing.scale : 1;
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = raw[i * channels + (channels === 1 ? 0 : c)] * bright;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
