// The device's camera as a source of pictures, and its microphone as one of sounds; browsers give them
// on https and localhost only.

import { within } from './fetching.js';

export const hasCamera = () => Boolean(navigator.mediaDevices?.getUserMedia);
export const hasMicrophone = () => hasCamera() && Boolean(globalThis.MediaRecorder);

export class Camera {
  constructor(video) {
    this.video = video;
    this.stream = null;
    this.request = 0; // whoever says stop while the browser still asks, does not want it any more
    this.facing = 'environment';
  }

  get isOn() {
    return this.stream !== null;
  }

  /** -> its stream; null if it was stopped before it began. */
  async start() {
    this.stop();
    const { request } = this;
    let stream;
    const wanted = { facingMode: { ideal: this.facing }, width: { ideal: 640 }, height: { ideal: 480 } };
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    } catch (error) {
      throw new Error(refusal('camera', error));
    }
    if (request !== this.request) {
      for (const track of stream.getTracks()) track.stop();
      return null;
    }
    this.stream = stream;
    this.video.srcObject = stream;
    await this.video.play();
    return stream;
  }

  stop() {
    this.request++;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    this.video.srcObject = null;
  }

  /** The other one of a phone. */
  async turn() {
    this.facing = this.facing === 'user' ? 'environment' : 'user';
    return this.start();
  }

  async count() {
    const devices = await navigator.mediaDevices.enumerateDevices();
    return devices.filter(({ kind }) => kind === 'videoinput').length;
  }

  /** What it sees now, as inputs.js takes pictures; null before the first one. */
  frame() {
    const { videoWidth: width, videoHeight: height } = this.video;
    if (!this.isOn || !width) return null;
    this.canvas ??= document.createElement('canvas');
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext('2d', { willReadFrequently: true });
    context.drawImage(this.video, 0, 0);
    return context.getImageData(0, 0, width, height);
  }
}

/** Milliseconds of microphone -> a file that readSound takes. begun: called once it is allowed. */
export async function record(milliseconds, begun = () => {}) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    throw new Error(refusal('microphone', error));
  }
  try {
    const recorder = new MediaRecorder(stream);
    const parts = [];
    recorder.addEventListener('dataavailable', (event) => parts.push(event.data));
    const ended = new Promise((resolve) => recorder.addEventListener('stop', resolve));
    recorder.start();
    begun();
    await new Promise((resolve) => setTimeout(resolve, milliseconds));
    recorder.stop();
    await within(ended, 5, 'the recorder did not end');
    return new File(parts, 'recording');
  } finally {
    for (const track of stream.getTracks()) track.stop();
  }
}

/** Why the browser gave no camera or microphone, in words. */
export function refusal(device, error) {
  const words = {
    NotAllowedError: `this page may not use the ${device}: allow it in the browser's settings for this page`,
    NotFoundError: `this device has no ${device}`,
    NotReadableError: `the ${device} is in use elsewhere`,
  };
  return words[error.name] ?? `the ${device} did not start: ${error.message}`;
}
