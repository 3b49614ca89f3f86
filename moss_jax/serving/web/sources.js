// Frame sources, and capturing frames from them.

// Longest side of a frame that is sent; the server scales it to the model's image size.
const LONGEST = 640, THUMB = 64, QUALITY = 0.9;

export async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error("A camera needs a page from https or from this computer.");
  return navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, facingMode: "environment" }, audio: false });
}

export async function openScreen() {
  if (!navigator.mediaDevices?.getDisplayMedia) throw new Error("This browser cannot share a screen.");
  return navigator.mediaDevices.getDisplayMedia({ video: true, audio: false });
}

// Describes an error of a source.
export function explain(error, source) {
  switch (error.name) {
    case "NotAllowedError":
      return source === "camera" ? "The camera was not allowed. Allow it in the browser's address bar, then start again." : "Nothing was chosen to share.";
    case "NotFoundError":
      return `There is no ${source} on this device.`;
    case "NotReadableError":
      return "Another program uses the camera.";
    default:
      return error.message || "The source cannot be opened.";
  }
}

function sizeOf(element) {
  const width = element.videoWidth || element.naturalWidth || element.width;
  const height = element.videoHeight || element.naturalHeight || element.height;
  return [width, height];
}

// Captures a frame of a canvas, video or image as a JPEG file; null if there is none yet.
export async function takeFrame(element) {
  const [width, height] = sizeOf(element);
  if (!width || !height) return null;
  let canvas = element;
  if (!(element instanceof HTMLCanvasElement)) {
    const scale = Math.min(1, LONGEST / Math.max(width, height));
    canvas = draw(element, Math.round(width * scale), Math.round(height * scale));
  }
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
  return blob && blob.arrayBuffer();
}

// A square thumbnail of a frame, for the timeline.
export function takeThumb(element) {
  const [width, height] = sizeOf(element);
  const side = Math.min(width, height), canvas = document.createElement("canvas");
  canvas.width = canvas.height = THUMB;
  canvas.getContext("2d").drawImage(element, (width - side) / 2, (height - side) / 2, side, side, 0, 0, THUMB, THUMB);
  return canvas.toDataURL("image/jpeg", 0.7);
}

function draw(element, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(element, 0, 0, width, height);
  return canvas;
}

// Calls back at a fixed rate, also while the page is hidden; skips calls due while one is running.
export class Ticker {
  constructor(call) {
    this.call = call;
    this.rate = 1;
    this.isRunning = false;
    this.isBusy = false;
    this.clock = new Worker(new URL("clock.js", import.meta.url));
    this.clock.onmessage = () => this.tick();
  }

  // Calls immediately, then periodically.
  start() {
    this.isRunning = true;
    this.clock.postMessage(this.rate);
    this.tick();
  }

  stop() {
    this.isRunning = false;
    this.clock.postMessage(0);
  }

  async tick() {
    if (!this.isRunning || this.isBusy) return;
    this.isBusy = true;
    try {
      await this.call();
    } finally {
      this.isBusy = false;
    }
  }
}
