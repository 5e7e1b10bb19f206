// Raw samples (pixels, waveforms, features, indices) -> the model's input, as manifest.json says. The same arithmetic as the
// Python tool's, float32 after each step:  x = raw / scale;  waveforms may become spectra;  x = (x - mean) / std

const round = Math.fround;

/** raw: typed array of shape [N, ...] -> {data, shape}: Float32Array, or BigInt64Array for indices. */
export function preprocess(raw, shape, settings) {
  if (!settings) return { data: raw, shape };
  if (settings.kind === 'indices') return { data: BigInt64Array.from(raw, BigInt), shape };
  let x = new Float32Array(raw.length);
  let out = shape;
  if (settings.kind === 'image') {
    const [n, height, width, channels = 1] = shape;
    out = [n, channels, height, width];
    const plane = height * width;
    for (let i = 0, from = 0; i < n; i++) {
      for (let pixel = 0; pixel < plane; pixel++) {
        for (let c = 0; c < channels; c++) x[(i * channels + c) * plane + pixel] = raw[from++];
      }
    }
  } else {
    for (let i = 0; i < raw.length; i++) x[i] = Number(raw[i]);
  }
  if (settings.scale !== 1) {
    const scale = round(settings.scale);
    for (let i = 0; i < x.length; i++) x[i] /= scale;
  }
  if (settings.kind === 'waveform') {
    out = [shape[0], 1, ...shape.slice(1)];
    if (settings.spectrum) {
      const { data, frames, bands } = spectra(x, shape[0], shape[1], settings.spectrum);
      x = data;
      out = [shape[0], 1, frames, bands];
    }
  }
  const perBand = Boolean(settings.spectrum);
  eachChannel(x, out, settings.mean, perBand, (value, mean) => value - mean);
  eachChannel(x, out, settings.std, perBand, (value, std) => value / std);
  return { data: x, shape: out };
}

/** One value for all, or one per channel (axis 1; of spectra: per band, the last axis). */
function eachChannel(x, shape, values, perBand, change) {
  if (!values?.length) return;
  const inner = perBand ? 1 : shape.slice(2).reduce((a, b) => a * b, 1);
  const rounded = Float32Array.from(values);
  for (let i = 0; i < x.length; i++) x[i] = change(x[i], rounded[rounded.length === 1 ? 0 : Math.floor(i / inner) % rounded.length]);
}

// ---- images -------------------------------------------------------------------------------------------------------

/** {pixels: RGBA bytes, width, height} -> Uint8Array [height, width, channels] of the wanted size: middle cut out, resized. */
export function fitImage({ pixels, width, height }, [toHeight, toWidth, channels]) {
  let image = new Uint8Array(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [pixels[4 * i], pixels[4 * i + 1], pixels[4 * i + 2]];
    // ITU-R 601-2 luma in 16 bit fixed point.
    if (channels === 1) image[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else image.set([r, g, b], 3 * i);
  }
  if (width === toWidth && height === toHeight) return image;
  const scale = Math.min(width / toWidth, height / toHeight);
  const [cutWidth, cutHeight] = [toWidth * scale, toHeight * scale];
  const [left, top] = [(width - cutWidth) / 2, (height - cutHeight) / 2];
  const across = weights(width, left, Math.min(width, left + cutWidth), toWidth);
  const down = weights(height, top, Math.min(height, top + cutHeight), toHeight);
  image = resizeAxis(image, height, width, channels, across);
  return resizeAxis(image, 1, height, toWidth * channels, down);
}

const PRECISION = 22; // bits after the point of a weight, as in Pillow, with which this agrees to the bit

/** Triangle filter of an antialiased bilinear resize: for each target, its first source and whole-number weights. */
function weights(size, from, to, target) {
  from = round(from);
  const scale = round(round(to) - from) / target;
  const width = Math.max(1, scale);
  return Array.from({ length: target }, (_, at) => {
    const centre = from + (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - width + 0.5));
    const end = Math.min(size, Math.trunc(centre + width + 0.5));
    const taps = [];
    for (let x = first; x < end; x++) taps.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) * (1 / width))));
    const sum = taps.reduce((a, b) => a + b, 0);
    return { first, taps: taps.map((tap) => Math.trunc(0.5 + (tap / sum) * 2 ** PRECISION)) };
  });
}

/** image [outer, length, inner] -> [outer, targets.length, inner], rounded to bytes. */
function resizeAxis(image, outer, length, inner, targets) {
  const out = new Uint8Array(outer * targets.length * inner);
  let at = 0;
  for (let o = 0; o < outer; o++) {
    for (const { first, taps } of targets) {
      for (let i = 0; i < inner; i++) {
        let sum = 2 ** (PRECISION - 1);
        for (let t = 0; t < taps.length; t++) sum += image[(o * length + first + t) * inner + i] * taps[t];
        out[at++] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** PRECISION)));
      }
    }
  }
  return out;
}

// ---- sounds -------------------------------------------------------------------------------------------------------

/** x: [n, samples] in [-1, 1] -> log-mel energies or MFCCs, Float32Array [n, frames, bands]. Computed in float64. */
function spectra(x, n, samples, s) {
  const frames = Math.max(0, 1 + Math.floor((samples - s.frame_length) / s.hop));
  if (frames < 1) throw new Error(`a sound of ${samples} samples is shorter than one frame of ${s.frame_length}`);
  const bands = s.coefficients || s.mel_bands;
  const window = Float64Array.from({ length: s.frame_length }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / s.frame_length));
  const [filters, transform] = [melFilters(s), fourier(s.fft_length)];
  const [real, imaginary] = [new Float64Array(s.fft_length), new Float64Array(s.fft_length)];
  const data = new Float32Array(n * frames * bands);
  let at = 0;
  for (let i = 0; i < n; i++) {
    for (let frame = 0; frame < frames; frame++) {
      real.fill(0);
      imaginary.fill(0);
      for (let t = 0; t < s.frame_length; t++) real[t] = x[i * samples + frame * s.hop + t] * window[t];
      const power = transform(real, imaginary);
      const logs = filters.map((filter) => Math.log(filter.reduce((sum, weight, bin) => sum + weight * power[bin], 0) + s.floor));
      const row = s.coefficients ? cosines(logs, s.coefficients) : logs;
      for (const value of row) data[at++] = value;
    }
  }
  return { data, frames, bands };
}

/** Triangles whose corners are evenly spaced in mel, linear in Hz, of height 1. */
function melFilters(s) {
  const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
  const [low, high] = [mel(s.low_hz), mel(s.high_hz)];
  const corner = (i) => 700 * (10 ** ((low + ((high - low) * i) / (s.mel_bands + 1)) / 2595) - 1);
  return Array.from({ length: s.mel_bands }, (_, band) => {
    const [left, centre, right] = [corner(band), corner(band + 1), corner(band + 2)];
    return Array.from({ length: Math.floor(s.fft_length / 2) + 1 }, (_, bin) => {
      const hertz = bin * (s.sample_rate / s.fft_length);
      return Math.max(0, Math.min((hertz - left) / (centre - left), (right - hertz) / (right - centre)));
    });
  });
}

/** Orthonormal DCT-II, the first `count` coefficients. */
function cosines(logs, count) {
  const m = logs.length;
  return Array.from({ length: count }, (_, i) => {
    const sum = logs.reduce((total, value, j) => total + value * Math.cos((Math.PI * i * (j + 0.5)) / m), 0);
    return sum * Math.sqrt(2 / m) * (i ? 1 : Math.SQRT1_2);
  });
}

/** length -> (real, imaginary) => power spectrum [length / 2 + 1]. The arrays are used up. */
function fourier(length) {
  const bins = Math.floor(length / 2) + 1;
  const cos = Float64Array.from({ length }, (_, i) => Math.cos((2 * Math.PI * i) / length));
  const sin = Float64Array.from({ length }, (_, i) => Math.sin((2 * Math.PI * i) / length));
  const power = (real, imaginary) => Float64Array.from({ length: bins }, (_, i) => real[i] ** 2 + imaginary[i] ** 2);
  if ((length & (length - 1)) === 0) {
    return (real, imaginary) => {
      radix2(real, imaginary, cos, sin);
      return power(real, imaginary);
    };
  }
  return (real) =>
    Float64Array.from({ length: bins }, (_, bin) => {
      let [a, b] = [0, 0];
      for (let t = 0; t < length; t++) {
        const at = (bin * t) % length;
        a += real[t] * cos[at];
        b -= real[t] * sin[at];
      }
      return a * a + b * b;
    });
}

function radix2(real, imaginary, cos, sin) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let size = 2; size <= n; size *= 2) {
    for (let start = 0; start < n; start += size) {
      for (let k = 0; k < size / 2; k++) {
        const [a, b, turn] = [start + k, start + k + size / 2, (k * n) / size];
        const re = real[b] * cos[turn] + imaginary[b] * sin[turn];
        const im = imaginary[b] * cos[turn] - real[b] * sin[turn];
        [real[b], imaginary[b]] = [real[a] - re, imaginary[a] - im];
        [real[a], imaginary[a]] = [real[a] + re, imaginary[a] + im];
      }
    }
  }
}
