// The table that the user arranges: shapes, a card with a digit, and a cloth over one of them. The canvas
// changes only on drop, so the model never sees an object in mid-air.

import { DIGITS, inkOf } from "./ink.js";
import { CARD, COLOURS, COLUMNS, Renderer, ROWS, SHAPES } from "./render.js";

const PLACES = ["on the left", "in the middle", "on the right"], SIDES = ["back", "front"];
// The model was trained on tables with up to four shapes.
const MOST_SHAPES = 4;
// Pointer movement in pixels at which a press becomes a drag.
const SLOP = 6;
const SVG = "http://www.w3.org/2000/svg";

const between = (low, high) => low + (high - low) * Math.random();
const same = (a, b) => a[0] === b[0] && a[1] === b[1];

// Icons with a 100x100 view box, for the tray and the dragged object.
export function icon(kind, colour) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "-50 -50 100 100");
  svg.setAttribute("aria-hidden", "true");
  const add = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    svg.append(node);
  };
  const fill = colour ? `rgb(${COLOURS[colour]})` : "currentColor";
  const corners = (n, inner, turn) =>
    Array.from({ length: n }, (_, k) => {
      const r = inner && k % 2 ? inner : 44, angle = (2 * Math.PI * k) / n + turn;
      return `${(r * Math.cos(angle)).toFixed(1)},${(r * Math.sin(angle)).toFixed(1)}`;
    }).join(" ");
  switch (kind) {
    case "circle": add("circle", { r: 38, fill }); break;
    case "square": add("rect", { x: -34, y: -34, width: 68, height: 68, fill }); break;
    case "triangle": add("polygon", { points: "0,-40 42,32 -42,32", fill }); break;
    case "star": add("polygon", { points: corners(10, 17, -Math.PI / 2), fill }); break;
    case "cross": add("path", { d: "M-13-40h26v27h27v26h-27v27h-26v-27h-27v-26h27z", fill }); break;
    case "ring": add("circle", { r: 30, fill: "none", stroke: fill, "stroke-width": 18 }); break;
    case CARD:
      add("rect", { x: -32, y: -40, width: 64, height: 80, rx: 3, fill: "#f6f4ee", stroke: "#8a8a80", "stroke-width": 2 });
      add("path", { d: "M-10-18q10-12 20 0q4 12-20 34h24", fill: "none", stroke: "#161a3a", "stroke-width": 6 });
      break;
    case "cover":
      add("rect", { x: -42, y: -42, width: 84, height: 84, rx: 3, fill: "#b2c0d0" });
      for (const y of [-34, -14, 6, 26]) add("rect", { x: -42, y, width: 84, height: 9, fill: "#8498b4" });
      break;
  }
  return svg;
}

// Events: "change" after the canvas has changed, "say" {text} for screen readers.
export class Playground extends EventTarget {
  constructor(elements, pad) {
    super();
    this.at = elements;
    this.pad = pad;
    this.renderer = new Renderer(elements.canvas.width);
    this.context = elements.canvas.getContext("2d");
    this.things = [];
    this.covered = null;
    this.coverAngle = 0;
    this.colour = "red";
    this.chosen = null; // the selected cell
    this.buildCells();
    this.buildTray();
    this.buildSwatches();
    const { write, cover, remove } = elements;
    write.onclick = () => this.write(this.find(CARD));
    cover.onclick = () => this.toggleCover(this.chosenThing);
    remove.onclick = () => this.takeAway(this.chosenThing);
    pad.addEventListener("written", ({ detail }) => this.putInk(detail));
    this.draw();
  }

  // ---------------------------------------------------------------------------------- the table

  find(kind) {
    return this.things.find((thing) => thing.kind === kind);
  }

  inCell(cell) {
    return this.things.find((thing) => same(thing.cell, cell));
  }

  get freeCells() {
    return this.cells.map((button) => button.cell).filter((cell) => !this.inCell(cell));
  }

  get chosenThing() {
    return this.chosen && this.inCell(this.chosen);
  }

  get state() {
    const things = this.things.map((thing) => ({ ...thing, ink: thing.ink && Array.from(thing.ink) }));
    return { things, covered: this.covered, coverAngle: this.coverAngle };
  }

  set state({ things, covered, coverAngle }) {
    this.things = things;
    this.covered = covered;
    this.coverAngle = coverAngle;
    this.draw();
  }

  // The initial table of a new page.
  begin() {
    this.things = [
      { kind: "circle", colour: "red", cell: [0, 0], ...this.pose() },
      { kind: "star", colour: "blue", cell: [2, 1], ...this.pose() },
    ];
    this.draw();
  }

  pose() {
    return { offset: [between(-0.025, 0.025), between(-0.025, 0.025)], angle: between(-0.25, 0.25) };
  }

  lay(kind, cell) {
    const shapes = this.things.filter((thing) => thing.kind !== CARD).length;
    if (kind !== CARD && shapes >= MOST_SHAPES) return this.say("There is room for four shapes. Take one away first.");
    cell ??= this.chosen && !this.inCell(this.chosen) ? this.chosen : this.freeCells[0];
    if (!cell) return this.say("No place is free.");
    const thing = { kind, cell, ...this.pose() };
    if (kind === CARD) return this.write(thing);
    thing.colour = this.colour;
    this.things.push(thing);
    this.changed(`The ${this.describe(thing)} lies ${this.place(cell)}.`, cell);
  }

  move(thing, cell) {
    if (same(thing.cell, cell)) return;
    if (this.inCell(cell)) return this.say("That place is taken.");
    if (thing.kind === this.covered) return this.say("Uncover it first.");
    this.things = [...this.things.filter((other) => other !== thing), { ...thing, cell, ...this.pose() }];
    this.changed(`The ${thing.kind} lies ${this.place(cell)}.`, cell);
  }

  recolour(thing, colour) {
    if (thing.kind === CARD || thing.kind === this.covered || thing.colour === colour) return;
    thing.colour = colour;
    this.changed(`The ${thing.kind} is ${colour}.`);
  }

  takeAway(thing) {
    if (!thing) return;
    if (thing.kind === this.covered) return this.say("Uncover it first.");
    this.things = this.things.filter((other) => other !== thing);
    this.changed(`The ${thing.kind} is taken away.`);
  }

  toggleCover(thing) {
    if (!thing) return;
    if (thing.kind === this.covered) return this.uncover();
    this.covered = thing.kind;
    this.coverAngle = thing.angle + between(-0.1, 0.1);
    this.changed(`The ${thing.kind} is covered.`);
  }

  uncover() {
    if (!this.covered) return;
    const kind = this.covered;
    this.covered = null;
    this.changed(`The ${kind} is uncovered.`);
  }

  // Opens the pad, for a card on the table or one that is added when something is written.
  write(card) {
    if (!card) return;
    if (this.covered === CARD) return this.say("Uncover the card first.");
    this.pending = card;
    this.pad.open();
  }

  type(digit) {
    const card = this.find(CARD);
    if (!card) return this.say("There is no card to write on.");
    if (this.covered === CARD) return this.say("Uncover the card first.");
    this.pending = card;
    this.putInk({ ink: inkOf(DIGITS[digit]), text: `The card shows ${digit}.` });
  }

  putInk({ ink, text }) {
    const card = this.pending;
    this.pending = null;
    if (!card) return;
    card.ink = ink;
    if (!this.things.includes(card)) this.things.push(card);
    this.changed(text ?? "The card shows what you drew.", card.cell);
  }

  changed(text, cell) {
    if (cell) this.chosen = cell;
    this.draw();
    this.dispatchEvent(new Event("change"));
    this.say(text);
  }

  say(text) {
    this.at.hint.textContent = text;
    this.dispatchEvent(new CustomEvent("say", { detail: text }));
  }

  describe(thing) {
    if (thing.kind === this.covered) return `something under the cloth`;
    return thing.kind === CARD ? "card" : `${thing.colour} ${thing.kind}`;
  }

  place([column, row]) {
    return `${PLACES[column]}, ${SIDES[row]}`;
  }

  draw() {
    this.renderer.draw(this.context, this);
    for (const button of this.cells) {
      const thing = this.inCell(button.cell), chosen = Boolean(this.chosen && same(this.chosen, button.cell));
      const what = thing ? this.describe(thing) : "empty";
      button.setAttribute("aria-label", `${this.place(button.cell)}: ${what}`);
      button.setAttribute("aria-pressed", String(chosen));
      button.classList.toggle("full", Boolean(thing));
    }
    const chosen = this.chosenThing, covered = Boolean(chosen && chosen.kind === this.covered);
    this.at.remove.disabled = !chosen || covered;
    this.at.cover.disabled = !chosen;
    this.at.cover.textContent = covered ? "Uncover" : "Cover";
    this.at.write.disabled = !this.find(CARD) || this.covered === CARD;
    const shown = chosen && !covered && chosen.colour ? chosen.colour : this.colour;
    for (const swatch of this.swatches ?? []) {
      swatch.setAttribute("aria-checked", String(swatch.dataset.colour === shown));
      swatch.tabIndex = swatch.dataset.colour === shown ? 0 : -1;
    }
    for (const button of this.tray ?? []) {
      const { kind } = button.dataset, out = Boolean(kind === "cover" ? this.covered : this.find(kind));
      button.setAttribute("aria-disabled", String(out));
      button.replaceChildren(icon(kind, kind === CARD || kind === "cover" ? "" : this.colour));
    }
  }

  // ------------------------------------------------------------------------------------- clicks and keys

  buildCells() {
    this.cells = [];
    for (let row = 0; row < ROWS; row++) {
      for (let column = 0; column < COLUMNS; column++) {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "cell";
        button.cell = [column, row];
        button.dataset.cell = `${column},${row}`;
        button.tabIndex = column || row ? -1 : 0;
        button.onclick = () => !this.isHandled() && this.press(button.cell);
        button.ondblclick = () => this.inCell(button.cell)?.kind === CARD && this.write(this.find(CARD));
        button.onpointerdown = (event) => {
          const thing = this.inCell(button.cell);
          this.drag(event, thing && thing.kind === this.covered ? { kind: "cover" } : thing, () => this.press(button.cell));
        };
        button.onkeydown = (event) => this.key(event, button);
        this.cells.push(button);
        this.at.cells.append(button);
      }
    }
  }

  // Whether a click merely ends a drag or a tap that has been handled.
  isHandled() {
    const { handled } = this;
    this.handled = false;
    return handled;
  }

  handle() {
    this.handled = true;
    setTimeout(() => (this.handled = false), 400);
  }

  press(cell) {
    const thing = this.chosenThing;
    if (this.inCell(cell) || !thing) {
      this.chosen = this.chosen && same(this.chosen, cell) ? null : cell;
      this.draw();
    } else {
      this.move(thing, cell);
    }
  }

  key(event, button) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [column, row] = button.cell, thing = this.inCell(button.cell);
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) {
      const [x, y] = [column + steps[event.key][0], row + steps[event.key][1]];
      const next = this.cells.find((other) => same(other.cell, [x, y]));
      if (next) this.focus(next);
    } else if (/^[0-9]$/.test(event.key)) {
      this.type(Number(event.key));
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.takeAway(thing);
    } else if (event.key.toLowerCase() === "v") {
      this.toggleCover(thing);
    } else if (event.key.toLowerCase() === "c" && thing?.colour) {
      const names = Object.keys(COLOURS);
      this.recolour(thing, names[(names.indexOf(thing.colour) + 1) % names.length]);
    } else if (event.key === "Escape") {
      this.chosen = null;
      this.draw();
    } else {
      return;
    }
    event.preventDefault();
  }

  focus(button) {
    for (const other of this.cells) other.tabIndex = other === button ? 0 : -1;
    button.focus();
  }

  buildTray() {
    this.tray = [...Object.keys(SHAPES), CARD, "cover"].map((kind) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.kind = kind;
      button.setAttribute("aria-label", kind === "cover" ? "Cloth: cover the chosen thing" : `Lay a ${kind}`);
      button.title = kind === "cover" ? "cloth" : kind;
      button.onclick = () => !this.isHandled() && this.fromTray(kind);
      button.onpointerdown = (event) => {
        const thing = { kind, colour: this.colour, isNew: true };
        this.drag(event, button.getAttribute("aria-disabled") === "true" ? null : thing, () => this.fromTray(kind));
      };
      this.at.tray.append(button);
      return button;
    });
  }

  fromTray(kind) {
    if (kind === "cover") {
      if (this.covered) return this.uncover();
      const thing = this.chosenThing ?? this.things.at(-1);
      return thing ? this.toggleCover(thing) : this.say("There is nothing to cover.");
    }
    const thing = this.find(kind);
    if (!thing) return this.lay(kind);
    this.chosen = thing.cell;
    this.draw();
    this.say(`The ${kind} is on the table already.`);
  }

  buildSwatches() {
    this.swatches = Object.keys(COLOURS).map((colour) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.colour = colour;
      button.setAttribute("role", "radio");
      button.setAttribute("aria-label", colour);
      button.title = colour;
      button.onclick = () => this.pick(colour);
      button.onkeydown = (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = this.swatches.at((this.swatches.indexOf(button) + step) % this.swatches.length);
        this.pick(next.dataset.colour);
        next.focus();
      };
      this.at.swatches.append(button);
      return button;
    });
    this.draw();
  }

  pick(colour) {
    this.colour = colour;
    if (this.chosenThing) this.recolour(this.chosenThing, colour);
    this.draw();
  }

  // ------------------------------------------------------------------------------------- dragging

  // Follows a pointer pressed on an object or on none. Taps are detected here, since browsers omit the click of
  // a tap that follows a quick drag.
  drag(event, thing, tap) {
    if (event.button || !event.isPrimary) return;
    const begin = [event.clientX, event.clientY], target = event.currentTarget;
    this.handled = false;
    let ghost = null, hasMoved = false;
    const stop = new AbortController();
    const finish = () => {
      stop.abort();
      ghost?.remove();
      this.at.table.classList.remove("dragging");
      for (const cell of this.cells) cell.classList.remove("target");
    };
    const move = ({ clientX, clientY }) => {
      hasMoved ||= Math.hypot(clientX - begin[0], clientY - begin[1]) >= SLOP;
      if (!hasMoved || !thing) return;
      ghost ??= this.lift(thing);
      ghost.style.transform = `translate(${clientX}px, ${clientY}px) translate(-50%, -50%)`;
      const over = this.cellAt(clientX, clientY);
      for (const cell of this.cells) cell.classList.toggle("target", cell === over);
    };
    const up = ({ clientX, clientY, pointerType }) => {
      finish();
      if (ghost) {
        this.handle();
        this.drop(thing, this.cellAt(clientX, clientY)?.cell);
      } else if (pointerType === "touch" && !hasMoved) {
        this.handle();
        tap();
      }
    };
    // Captures the pointer; the page does not scroll because of touch-action in the CSS.
    if (thing) target.setPointerCapture(event.pointerId);
    target.addEventListener("pointermove", move, stop);
    target.addEventListener("pointerup", up, stop);
    target.addEventListener("pointercancel", finish, stop);
  }

  // The image of an object that follows the pointer.
  lift(thing) {
    const ghost = document.createElement("div");
    ghost.className = "ghost";
    ghost.append(icon(thing.kind, thing.colour));
    const side = this.at.table.clientWidth * (thing.kind === "cover" ? 0.4 : 0.27);
    ghost.style.width = ghost.style.height = `${side}px`;
    document.body.append(ghost);
    this.at.table.classList.add("dragging");
    return ghost;
  }

  cellAt(x, y) {
    return this.cells.find((cell) => {
      const box = cell.getBoundingClientRect();
      return box.left <= x && x < box.right && box.top <= y && y < box.bottom;
    });
  }

  drop(thing, cell) {
    if (thing.kind === "cover") {
      const under = cell && this.inCell(cell);
      if (under && under.kind !== this.covered) this.toggleCover(under);
      else if (!under) this.uncover();
    } else if (thing.isNew) {
      if (!cell) return;
      if (this.inCell(cell)) return this.say("That place is taken.");
      this.lay(thing.kind, cell);
    } else if (cell) {
      this.move(thing, cell);
    } else {
      this.takeAway(thing);
    }
  }
}

// The card, enlarged, to draw on. Event: "written" {ink, text}.
export class Pad extends EventTarget {
  constructor({ dialog, paper, clear, cancel, done }) {
    super();
    Object.assign(this, { dialog, paper, done });
    this.context = paper.getContext("2d");
    this.strokes = [];
    paper.onpointerdown = (event) => this.begin(event);
    clear.onclick = () => this.clear();
    cancel.onclick = () => dialog.close();
    dialog.addEventListener("close", () => this.close());
    dialog.addEventListener("keydown", (event) => {
      if (/^[0-9]$/.test(event.key)) this.show(DIGITS[event.key], `The card shows ${event.key}.`);
      if (event.key !== "Enter" || event.target !== paper || !this.strokes.length) return;
      // Otherwise the key would press the button that regains the focus.
      event.preventDefault();
      dialog.close("done");
    });
  }

  open() {
    this.clear();
    this.dialog.returnValue = "";
    this.dialog.showModal();
  }

  close() {
    if (this.dialog.returnValue !== "done" || !this.strokes.length) return;
    this.dispatchEvent(new CustomEvent("written", { detail: { ink: inkOf(this.strokes), text: this.text } }));
  }

  clear() {
    this.show([]);
  }

  show(strokes, text) {
    const { width, height } = this.paper, scale = (height * 0.8) / 100;
    const place = ([x, y]) => [width / 2 + (x - 50) * scale, height / 2 + (y - 50) * scale];
    this.strokes = strokes.map((stroke) => stroke.map(place));
    this.text = text;
    this.draw();
  }

  begin(event) {
    if (event.button) return;
    event.preventDefault();
    const point = ({ clientX, clientY }) => {
      const box = this.paper.getBoundingClientRect();
      return [((clientX - box.left) / box.width) * this.paper.width, ((clientY - box.top) / box.height) * this.paper.height];
    };
    const stroke = [point(event)];
    this.text = undefined;
    this.strokes.push(stroke);
    this.paper.setPointerCapture(event.pointerId);
    this.paper.onpointermove = (moved) => {
      for (const each of moved.getCoalescedEvents?.() ?? [moved]) stroke.push(point(each));
      this.draw();
    };
    this.paper.onpointerup = this.paper.onpointercancel = () => {
      this.paper.onpointermove = this.paper.onpointerup = this.paper.onpointercancel = null;
    };
    this.draw();
  }

  draw() {
    const { context, paper } = this;
    context.fillStyle = "rgb(246, 244, 238)";
    context.fillRect(0, 0, paper.width, paper.height);
    context.strokeStyle = "rgb(22, 26, 58)";
    context.lineWidth = 34;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(...stroke[0]);
      if (stroke.length === 1) context.lineTo(stroke[0][0] + 0.1, stroke[0][1]);
      // Curves through the midpoints, so that the line is smooth.
      for (let k = 1; k < stroke.length; k++) {
        const [x, y] = stroke[k - 1];
        context.quadraticCurveTo(x, y, (x + stroke[k][0]) / 2, (y + stroke[k][1]) / 2);
      }
      if (stroke.length > 1) context.lineTo(...stroke.at(-1));
      context.stroke();
    }
    this.done.disabled = !this.strokes.length;
  }
}
