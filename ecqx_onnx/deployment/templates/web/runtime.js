// onnxruntime-web from the folder's runtime/: on WebAssembly, or on WebGPU where there is an adapter.
// Its modules are named .js here, as many servers send .mjs as no script.

import { fetchFile, within } from './fetching.js';

const FILES = {
  wasm: { script: 'ort.wasm.min.js', loader: 'ort-wasm-simd-threaded.js', binary: 'ort-wasm-simd-threaded.wasm' },
  webgpu: {
    script: 'ort.webgpu.min.js',
    loader: 'ort-wasm-simd-threaded.asyncify.js',
    binary: 'ort-wasm-simd-threaded.asyncify.wasm',
  },
};
const EMPTY_MODULE = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0);
// (func (result v128) (v128.const 0)), which is valid only where there is SIMD.
const SIMD_MODULE = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 22, 1, 20, 0, 253, 12,
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11,
);

/** Throws, in words, where this browser or its server's rules let no WebAssembly run. */
export function checkWebAssembly() {
  if (typeof WebAssembly !== 'object') {
    throw new Error('this browser has no WebAssembly (iOS turns it off in Lockdown Mode)');
  }
  try {
    new WebAssembly.Module(EMPTY_MODULE);
  } catch {
    throw new Error(
      "this server's Content-Security-Policy forbids WebAssembly: add 'wasm-unsafe-eval' to its script-src",
    );
  }
  if (!WebAssembly.validate(SIMD_MODULE)) {
    throw new Error('this browser has no WebAssembly SIMD, which onnxruntime needs: update it');
  }
}

/** kind: 'wasm' or 'webgpu' -> onnxruntime-web's module. told: as fetchBytes takes it. */
export async function loadRuntime(kind, told) {
  const { script, loader, binary } = FILES[kind];
  const at = (name) => new URL(`runtime/${name}`, document.baseURI).href;
  // Fetched here, with patience and progress, into the browser's cache: from there it is compiled
  // while it is read, and its code is kept for the next visit.
  const { bytes, type, kept } = await fetchFile(`runtime/${binary}`, told);
  const ort = await import(`./runtime/${script}`);
  ort.env.wasm.wasmPaths = { mjs: at(loader), wasm: at(binary) };
  if (type !== 'application/wasm' || !kept) ort.env.wasm.wasmBinary = bytes.buffer;
  return ort;
}

/** A GPU's adapter in words, or null. */
export async function findAdapter() {
  if (!navigator.gpu) return null;
  try {
    const adapter = await within(navigator.gpu.requestAdapter(), 5, 'no answer');
    if (!adapter) return null;
    const { vendor = '', architecture = '' } = adapter.info ?? {};
    return `${vendor} ${architecture}`.trim() || 'a GPU';
  } catch {
    return null;
  }
}
