// Timeline of the last minutes, with thumbnails of the frames and the text above them; and the memory view.

import { clock, spoken } from "./transcript.js";

// Seconds kept, pixels per second, and thumbnail size in pixels.
const KEPT = 300, SCALE = 30, THUMB = 56;
const ROWS = 3, ROW = 30;
const DETAILS = ["whole", "quarter", "sixteenth", "one"];
const DETAIL_WORDS = { whole: "whole", quarter: "a quarter", sixteenth: "a sixteenth", one: "one vector" };
// Thumbnail resolution in pixels a side, by how much of the frame is in memory.
const SIDES = { quarter: 14, sixteenth: 7, one: 1 };

export class Timeline {
  constructor({ scroller, track, thumbs, said, empty, latest }) {
    Object.assign(this, { scroller, track, thumbs, said, empty, latest });
    this.frames = []; // {time, url, fate, detail, node}
    this.words = []; // {entry, node, row}
    this.sticks = true;
    scroller.addEventListener("scroll", () => {
      this.sticks = scroller.scrollWidth - scroller.scrollLeft - scroller.clientWidth < 30;
      latest.hidden = this.sticks;
    });
    latest.onclick = () => this.toEnd();
    new ResizeObserver(() => this.sticks && this.toEnd()).observe(scroller);
  }

  get begin() {
    const first = Math.min(this.frames[0]?.time ?? Infinity, this.words[0]?.entry.time ?? Infinity);
    return first === Infinity ? 0 : first;
  }

  addFrame(frame) {
    // Shows no more thumbnails than fit side by side.
    const last = this.frames.at(-1);
    this.frames.push(frame);
    frame.isShown = !last || frame.time - (this.shownTime ?? -Infinity) >= THUMB / SCALE;
    if (frame.isShown) {
      this.shownTime = frame.time;
      frame.node = document.createElement("figure");
      const image = document.createElement("img"), caption = document.createElement("figcaption");
      image.alt = "";
      image.width = image.height = THUMB;
      image.src = frame.url;
      caption.textContent = clock(frame.time);
      frame.node.append(image, caption);
      this.thumbs.append(frame.node);
    }
    this.place();
  }

  setFate(frame, fate) {
    frame.fate = fate;
    if (frame.node) frame.node.dataset.fate = fate;
  }

  addWords(entry) {
    if (entry.time === null || entry.time === undefined) return;
    const node = document.createElement("li"), word = { entry, node };
    node.className = `word ${entry.kind}`;
    this.said.append(node);
    this.words.push(word);
    this.update(entry);
    this.place();
  }

  update(entry) {
    const word = this.words.find((each) => each.entry === entry);
    if (!word) return;
    word.node.textContent = spoken(entry).trim();
    word.node.title = `${clock(entry.time)} ${spoken(entry).trim()}`;
    word.node.classList.toggle("alert", Boolean(entry.alert));
    word.node.classList.toggle("corrected", entry.struck.length > 0);
    this.placeSoon();
  }

  placeSoon() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.place();
    });
  }

  place() {
    const end = Math.max(this.frames.at(-1)?.time ?? 0, this.words.at(-1)?.entry.time ?? 0);
    while (this.frames.length && this.frames[0].time < end - KEPT) this.frames.shift().node?.remove();
    while (this.words.length && this.words[0].entry.time < end - KEPT) this.words.shift().node.remove();
    this.empty.hidden = this.frames.length + this.words.length > 0;
    this.track.hidden = !this.empty.hidden;
    const { begin } = this;
    const free = Array(ROWS).fill(-Infinity);
    let width = (end - begin) * SCALE + THUMB + 8;
    for (const word of this.words) {
      const left = (word.entry.time - begin) * SCALE;
      let row = free.findIndex((until) => until <= left);
      if (row < 0) row = free.indexOf(Math.min(...free));
      const from = Math.max(left, free[row]);
      word.node.style.transform = `translate(${from}px, ${row * ROW}px)`;
      free[row] = from + Math.min(word.node.offsetWidth || 8 * word.node.textContent.length, 320) + 8;
      width = Math.max(width, free[row]);
    }
    for (const frame of this.frames) {
      if (frame.node) frame.node.style.transform = `translateX(${(frame.time - begin) * SCALE}px)`;
    }
    this.track.style.width = `${width}px`;
    if (this.sticks) this.toEnd();
  }

  toEnd() {
    this.scroller.scrollLeft = this.scroller.scrollWidth;
    this.sticks = true;
    this.latest.hidden = true;
  }

  // Shows each thumbnail at the detail that is left in memory.
  setMemory(items) {
    for (const frame of this.frames) {
      if (!frame.node) continue;
      const item = items.findLast((each) => each.time <= frame.time + 1e-3);
      const detail = item?.detail ?? "gone";
      if (frame.detail === detail) continue;
      frame.detail = detail;
      frame.node.dataset.detail = detail;
      frame.node.title = detail === "gone" ? "not in memory" : `in memory: ${DETAIL_WORDS[detail]}`;
      pixelate(frame, SIDES[detail]);
    }
  }

  get state() {
    return this.frames.map(({ time, url, fate }) => ({ time, url, fate }));
  }

  clear() {
    this.frames = [];
    this.words = [];
    this.shownTime = undefined;
    this.thumbs.replaceChildren();
    this.said.replaceChildren();
    this.place();
  }
}

function pixelate(frame, side) {
  const image = frame.node.querySelector("img");
  if (!side) {
    image.src = frame.url;
    return;
  }
  const whole = new Image();
  whole.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    canvas.getContext("2d").drawImage(whole, 0, 0, side, side);
    image.src = canvas.toDataURL();
  };
  whole.src = frame.url;
}

// Contents of the memory bank, oldest moment on the left; taller bars are more detailed.
export class Memory {
  constructor(canvas, legend) {
    this.canvas = canvas;
    this.legend = legend;
    this.items = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
    for (const change of [matchMedia("(prefers-color-scheme: dark)")]) change.addEventListener("change", () => this.draw());
  }

  set(items) {
    this.items = items;
    const counts = Object.fromEntries(DETAILS.map((detail) => [detail, items.filter((i) => i.detail === detail).length]));
    for (const node of this.legend.children) node.querySelector("b").textContent = counts[node.dataset.detail];
    const parts = DETAILS.filter((d) => counts[d]).map((d) => `${counts[d]} ${d === "one" ? "as one vector" : d}`);
    const label = items.length
      ? `${items.length} moments from ${clock(items[0].time)} to ${clock(items.at(-1).time)}: ${parts.join(", ")}`
      : "Nothing is in memory yet";
    this.canvas.setAttribute("aria-label", label);
    this.canvas.title = items.length ? label : "";
    this.draw();
  }

  draw() {
    const { canvas, items } = this, ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    // The computed colour is that of the theme; the property itself is a light-dark().
    const colour = (name) => {
      canvas.style.color = `var(--${name})`;
      return style.color;
    };
    const floor = height - 16;
    context.fillStyle = colour("line");
    context.fillRect(0, floor, width, 1);
    context.font = `11px ${style.getPropertyValue("--font")}`;
    context.fillStyle = colour("soft");
    context.textBaseline = "bottom";
    if (!items.length) {
      context.fillText("Nothing is in memory yet", 0, height);
      return;
    }
    const step = Math.min(12, width / items.length), bar = Math.max(1, step - (step > 3 ? 1 : 0));
    const shades = Object.fromEntries(DETAILS.map((detail) => [detail, colour(detail)]));
    const heights = { whole: 1, quarter: 0.66, sixteenth: 0.38, one: 0.16 };
    for (const [k, item] of items.entries()) {
      context.fillStyle = shades[item.detail];
      const tall = (floor - 2) * heights[item.detail];
      context.fillRect(k * step, floor - tall, bar, tall);
    }
    context.fillStyle = colour("soft");
    context.fillText(clock(items[0].time), 0, height);
    const last = clock(items.at(-1).time), end = Math.min(width, items.length * step);
    const room = context.measureText(last).width;
    if (end > 2 * room + 30) context.fillText(last, end - room, height);
  }
}
