// Source of the model's frames: the playground, a camera, a screen or a file; and whether it is watched.

import { explain, openCamera, openScreen, Ticker } from "./sources.js";

const $ = (id) => document.getElementById(id);

const NOTES = {
  camera: "The camera's picture goes to this server, and nowhere else.",
  screen: "Choose a window or a screen to share.",
  file: "Choose a video or an image below, or drop one here.",
};

// Events: "source" when another source is chosen, "change" when watching starts or stops.
export class Stage extends EventTarget {
  // `take` is called for each due frame.
  constructor(take) {
    super();
    this.source = "playground";
    this.media = null; // {stream} of camera or screen, {url, image?} of a file
    this.hasBegun = false;
    this.ticker = new Ticker(take);
    this.tabs = [...document.querySelectorAll("[role=radio][data-source]")];
    for (const tab of this.tabs) {
      tab.onclick = () => this.choose(tab.dataset.source);
      tab.onkeydown = (event) => this.step(event, tab);
    }
    $("start").onclick = () => (this.isRunning ? this.stop() : this.start());
    $("rate").onchange = () => this.isRunning && this.tick();
    $("pick").onchange = () => {
      this.openFile($("pick").files[0]);
      $("pick").value = "";
    };
    $("stage").addEventListener("dragover", (event) => event.preventDefault());
    $("stage").addEventListener("drop", (event) => {
      event.preventDefault();
      this.openFile(event.dataTransfer.files[0]);
    });
  }

  get isRunning() {
    return this.ticker.isRunning;
  }

  // The element that shows the source.
  get picture() {
    return this.source === "playground" ? $("table") : this.media?.image ?? $("video");
  }

  step(event, tab) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = this.tabs.at((this.tabs.indexOf(tab) + step) % this.tabs.length);
    next.focus();
    this.choose(next.dataset.source);
  }

  choose(name) {
    if (name !== this.source) {
      this.stop();
      this.close();
    }
    this.source = name;
    $("stage").dataset.source = name;
    for (const tab of this.tabs) {
      tab.setAttribute("aria-checked", String(tab.dataset.source === name));
      tab.tabIndex = tab.dataset.source === name ? 0 : -1;
    }
    $("playground").hidden = $("tools").hidden = name !== "playground";
    $("video-tools").hidden = name === "playground";
    $("pick-label").hidden = $("pick").hidden = name !== "file";
    $("video").hidden = name === "playground" || !this.media;
    this.note(this.media ? "" : NOTES[name]);
    this.show();
    this.dispatchEvent(new Event("source"));
  }

  note(text) {
    $("stage-note").textContent = text ?? "";
    $("stage-note").hidden = !text;
  }

  close() {
    for (const track of this.media?.stream?.getTracks() ?? []) track.stop();
    if (this.media?.url) URL.revokeObjectURL(this.media.url);
    this.media?.image?.remove();
    this.media = null;
    $("video").srcObject = null;
    $("video").removeAttribute("src");
    $("video").hidden = true;
  }

  // Whether the source is available; asks the user for it if necessary.
  async open() {
    if (this.source === "playground" || this.media) return true;
    if (this.source === "file") {
      $("pick").click();
      return false;
    }
    const { source } = this;
    try {
      const stream = await (source === "camera" ? openCamera() : openScreen());
      if (source !== this.source) {
        for (const track of stream.getTracks()) track.stop();
        return false;
      }
      this.media = { stream };
      stream.getVideoTracks()[0].onended = () => {
        this.stop();
        this.close();
        this.note("The source has ended.");
      };
      $("video").srcObject = stream;
      $("video").hidden = false;
      await $("video").play();
      this.note("");
      return true;
    } catch (error) {
      this.note(explain(error, source));
      return false;
    }
  }

  async openFile(file) {
    if (!file) return;
    this.choose("file");
    this.stop();
    this.close();
    const url = URL.createObjectURL(file), video = $("video");
    this.media = { url };
    try {
      if (file.type.startsWith("image/")) {
        const image = new Image();
        image.src = url;
        image.alt = "What the model sees";
        await image.decode();
        this.media.image = image;
        $("stage").append(image);
      } else {
        await new Promise((done, fail) => {
          video.onloadeddata = done;
          video.onerror = fail;
          video.src = url;
        });
        video.onended = () => this.stop();
        video.hidden = false;
      }
    } catch {
      this.close();
      this.note("This browser cannot show that file. Try an MP4 or WebM video, or a JPEG or PNG image.");
      return;
    }
    this.note("");
    await this.start();
  }

  async start() {
    if (!(await this.open())) return;
    if (this.source === "file" && !this.media.image) await $("video").play();
    this.hasBegun = true;
    this.tick();
    this.show();
    this.dispatchEvent(new Event("change"));
  }

  // Captures a frame now, then at the chosen rate.
  tick() {
    this.ticker.rate = this.source === "playground" ? 1 : Number($("rate").value);
    this.ticker.start();
  }

  stop() {
    if (!this.isRunning) return;
    this.ticker.stop();
    if (this.source === "file") $("video").pause();
    this.show();
    this.dispatchEvent(new Event("change"));
  }

  show() {
    const { isRunning } = this, start = $("start");
    start.querySelector("span").textContent = isRunning ? "Pause" : this.hasBegun ? "Continue watching" : "Start watching";
    start.classList.toggle("running", isRunning);
    start.querySelector("path").setAttribute("d", isRunning ? "M7 5h3v14H7zM14 5h3v14h-3z" : "M7 4l13 8-13 8z");
    $("seeing").hidden = !isRunning;
    $("stage").classList.toggle("running", isRunning);
  }
}
