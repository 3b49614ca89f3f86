// Draws the tabletop world, as moss_jax/worlds/tabletop/render.py does: flat shapes, a card with a digit and a
// cloth, seen from straight above. Shapes are signed distance fields, evaluated in the box around each thing.
// Positions and lengths are in table units: the picture is [0, 1] x [0, 1], x to the right and y down.

export const COLOURS = {
  red: [206, 44, 40],
  green: [48, 150, 66],
  blue: [36, 84, 200],
  yellow: [240, 206, 36],
  purple: [134, 56, 164],
  black: [26, 26, 28],
};
export const CARD = "card";
export const COLUMNS = 3, ROWS = 2;

const CARD_RGB = [246, 244, 238], INK_RGB = [22, 26, 58];
const CLOTH_RGB = [178, 192, 208], STRIPE_RGB = [132, 152, 180];
// Half the width and half the height of the rectangles.
export const CARD_HALF = [0.13, 0.16], DIGIT_HALF = [0.095, 0.12], COVER_HALF = [0.18, 0.2];
const STRIPE = 0.055;
const SHADOW = 0.0125, SHADOW_SOFT = 0.008, SHADOW_DEPTH = 0.32;

const rectangle = (u, v, half) => Math.max(Math.abs(u) - half[0], Math.abs(v) - half[1]);
const RAYS = [0, 1, 2, 3, 4].map((k) => {
  const angle = (2 * Math.PI * k) / 5 + Math.PI / 2;
  return [Math.cos(angle), Math.sin(angle)];
});

function star(u, v) {
  // A pentagram is the set of points that are outside at most one of its five lines.
  let first = -1, second = -1;
  for (const [cos, sin] of RAYS) {
    const beyond = cos * u + sin * v;
    second = Math.max(second, Math.min(first, beyond));
    first = Math.max(first, beyond);
  }
  return second - 0.136 * Math.cos((2 * Math.PI) / 5);
}

function cross(u, v) {
  u = Math.abs(u);
  v = Math.abs(v);
  return Math.max(Math.max(u, v) - 0.114, Math.min(u, v) - 0.038);
}

// Each shape's signed distance from its outline, negative inside, and half the width and height of its box.
export const SHAPES = {
  circle: [(u, v) => Math.hypot(u, v) - 0.11, [0.11, 0.11]],
  square: [(u, v) => rectangle(u, v, [0.096, 0.096]), [0.096, 0.096]],
  triangle: [(u, v) => Math.max(Math.sqrt(0.75) * Math.abs(u) - 0.5 * v, v) - 0.066, [0.116, 0.132]],
  star: [star, [0.13, 0.136]],
  cross: [cross, [0.114, 0.114]],
  ring: [(u, v) => Math.abs(Math.hypot(u, v) - 0.086) - 0.028, [0.114, 0.114]],
};

// Base colour of the tables and their texture: planks, board or linen.
export const TABLES = {
  oak: { wood: [190, 150, 106], texture: "planks" },
  cream: { wood: [190, 180, 160], texture: "linen" },
  grey: { wood: [148, 148, 146], texture: "board" },
  walnut: { wood: [148, 108, 78], texture: "planks" },
};
const LIGHT = 1.03, SLOPE = [-0.06, -0.08];

export function centre({ cell, offset = [0, 0] }) {
  return [(cell[0] + 0.5) / COLUMNS + offset[0], (cell[1] + 0.5) / ROWS + offset[1]];
}

function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function shade(texture, size) {
  const next = random(11), turn = () => next() * 2 * Math.PI;
  const planks = texture === "planks" ? 5 : 1;
  const tones = Array.from({ length: planks }, () => 0.94 + 0.12 * next());
  // Streaks along x that wander slowly, none finer than about three pixels at a size of 112.
  const streaks = [3, 7, 13, 21, 33].map((frequency) => ({
    frequency,
    phase: Array.from({ length: planks }, turn),
    bend: Array.from({ length: planks }, turn),
    where: Array.from({ length: planks }, turn),
  }));
  const found = new Float32Array(size * size);
  for (let i = 0; i < size; i++) {
    const y = (i + 0.5) / size + 0.11;
    for (let j = 0; j < size; j++) {
      const x = (j + 0.5) / size + 0.3;
      let value = 1;
      if (texture === "linen") {
        value += 0.035 * Math.sin(2 * Math.PI * 22 * x) * Math.sin(2 * Math.PI * 22 * y);
        value += 0.02 * Math.sin(3.1 * x + 2.3 * y + Math.sin(2.7 * y - x));
      } else {
        const plank = planks > 1 ? Math.floor(y / 0.27) : 0;
        for (const { frequency, phase, bend, where } of streaks) {
          const wander = Math.sin(1.7 * x + bend[plank]) + 0.5 * Math.sin(4.3 * x + where[plank]);
          value += 0.016 * Math.sin(2 * Math.PI * frequency * y + 0.09 * frequency * wander + phase[plank]);
        }
        if (planks > 1) {
          const gap = Math.abs(((y + 0.135) % 0.27) - 0.135) * size;
          value *= tones[plank] * (1 - 0.22 * clip(size / 224 + 0.5 - gap));
        }
      }
      found[i * size + j] = value;
    }
  }
  return found;
}

const clip = (x) => (x < 0 ? 0 : x > 1 ? 1 : x);

// Enlarges a digit's ink, 8x8 in [0, 1], smoothly: [height + 2, width + 2] with an empty border.
function enlarge(ink, width, height) {
  // A Catmull-Rom spline: smooth, yet the small holes of an 8 or a 4 stay open.
  const weights = (n) =>
    Array.from({ length: 4 * n }, (_, k) =>
      Array.from({ length: 8 }, (_, m) => {
        const t = Math.abs(((k + 0.5) * 8) / (4 * n) - 0.5 - m);
        if (t < 1) return 1 - 2.5 * t ** 2 + 1.5 * t ** 3;
        return t < 2 ? 2 - 4 * t + 2.5 * t ** 2 - t ** 3 / 2 : 0;
      }),
    );
  const across = weights(width), down = weights(height);
  const found = new Float32Array((height + 2) * (width + 2));
  const rows = new Float32Array(8);
  for (let i = 0; i < 4 * height; i++) {
    for (let m = 0; m < 8; m++) {
      rows[m] = 0;
      for (let k = 0; k < 8; k++) rows[m] += down[i][k] * ink[k * 8 + m];
    }
    for (let j = 0; j < 4 * width; j++) {
      let fine = 0;
      for (let m = 0; m < 8; m++) fine += across[j][m] * rows[m];
      const t = clip((fine - 0.3) / 0.55);
      found[((i >> 2) + 1) * (width + 2) + (j >> 2) + 1] += (t * t * (3 - 2 * t)) / 16;
    }
  }
  return found;
}

function written(ink, size) {
  const width = Math.round(2 * DIGIT_HALF[0] * size), height = Math.round(2 * DIGIT_HALF[1] * size);
  const fine = enlarge(ink, width, height);
  return (u, v) => {
    let x = (u / (2 * DIGIT_HALF[0]) + 0.5) * width + 0.5, y = (v / (2 * DIGIT_HALF[1]) + 0.5) * height + 0.5;
    x = Math.min(Math.max(x, 0), width + 1 - 1e-3);
    y = Math.min(Math.max(y, 0), height + 1 - 1e-3);
    const i = Math.floor(y), j = Math.floor(x), at = i * (width + 2) + j;
    x -= j;
    y -= i;
    const top = fine[at] * (1 - x) + fine[at + 1] * x;
    return top * (1 - y) + (fine[at + width + 2] * (1 - x) + fine[at + width + 3] * x) * y;
  };
}

// Distance and colour of an object as functions of points in its frame, and half its bounding box.
function looks(thing, size) {
  if (thing.kind === CARD) {
    const ink = thing.ink ? written(thing.ink, size) : () => 0;
    const rgb = (u, v, _, out) => {
      const t = ink(u, v);
      for (let c = 0; c < 3; c++) out[c] = CARD_RGB[c] + (INK_RGB[c] - CARD_RGB[c]) * t;
    };
    return [(u, v) => rectangle(u, v, CARD_HALF), rgb, CARD_HALF];
  }
  if (thing.kind === "cover") {
    const rgb = (u, v, _, out) => {
      const t = 0.5 + 0.5 * Math.cos(((2 * Math.PI) / STRIPE) * v);
      for (let c = 0; c < 3; c++) out[c] = CLOTH_RGB[c] + (STRIPE_RGB[c] - CLOTH_RGB[c]) * t;
    };
    return [(u, v) => rectangle(u, v, COVER_HALF), rgb, COVER_HALF];
  }
  const [outline, half] = SHAPES[thing.kind], paint = COLOURS[thing.colour];
  // Slightly darker at the rim, to set a shape off from the table.
  const rgb = (u, v, distance, out) => {
    const rim = Math.min(Math.max(0.9 - distance * (0.1 / 0.03), 0.9), 1);
    for (let c = 0; c < 3; c++) out[c] = paint[c] * rim;
  };
  return [outline, rgb, half];
}

// A renderer for one canvas size.
export class Renderer {
  constructor(size, table = "oak") {
    this.size = size;
    // One pixel wide at the model's resolution.
    this.edge = 1;
    this.shift = Math.round(SHADOW * size);
    this.setTable(table);
  }

  setTable(name) {
    const { wood, texture } = TABLES[name], shades = shade(texture, this.size);
    this.empty = new Float32Array(3 * shades.length);
    for (let k = 0; k < shades.length; k++) {
      for (let c = 0; c < 3; c++) this.empty[3 * k + c] = wood[c] * shades[k];
    }
    this.picture = new Float32Array(this.empty.length);
  }

  // Draws objects from bottom to top, and the cover over one of them.
  draw(context, { things, covered, coverAngle = 0 }) {
    this.picture.set(this.empty);
    for (const thing of things) this.lay(thing, ...centre(thing));
    const hidden = things.find((thing) => thing.kind === covered);
    if (hidden) this.lay({ kind: "cover", angle: coverAngle }, ...centre(hidden));
    const { size, picture } = this, image = context.createImageData(size, size);
    for (let i = 0, k = 0; i < size; i++) {
      for (let j = 0; j < size; j++, k++) {
        const x = (j + 0.5) / size - 0.5, y = (i + 0.5) / size - 0.5;
        const light = LIGHT * (1 + SLOPE[0] * x + SLOPE[1] * y);
        for (let c = 0; c < 3; c++) image.data[4 * k + c] = picture[3 * k + c] * light;
        image.data[4 * k + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  lay(thing, x, y) {
    const { size, picture, shift } = this, angle = thing.angle ?? 0;
    const [outline, rgb, half] = looks(thing, size);
    const cos = Math.cos(angle), sin = Math.sin(angle), soft = 2 * SHADOW_SOFT * size;
    const around = this.edge / 2 + SHADOW_SOFT * size + 1;
    const reachX = (Math.abs(cos) * half[0] + Math.abs(sin) * half[1]) * size + around;
    const reachY = (Math.abs(sin) * half[0] + Math.abs(cos) * half[1]) * size + around;
    const left = Math.max(0, Math.floor(x * size - reachX));
    const right = Math.min(size, Math.ceil(x * size + reachX) + shift);
    const top = Math.max(0, Math.floor(y * size - reachY));
    const bottom = Math.min(size, Math.ceil(y * size + reachY) + shift);
    const at = (i, j) => {
      const dx = (j + 0.5) / size - x, dy = (i + 0.5) / size - y;
      return [cos * dx + sin * dy, cos * dy - sin * dx];
    };
    const out = [0, 0, 0];
    for (let i = top; i < bottom; i++) {
      for (let j = left; j < right; j++) {
        const shadow = clip(0.5 - (outline(...at(i - shift, j - shift)) * size) / soft);
        const [u, v] = at(i, j), distance = outline(u, v);
        const cover = clip(0.5 - (distance * size) / this.edge);
        if (!shadow && !cover) continue;
        if (cover) rgb(u, v, distance, out);
        const keep = (1 - SHADOW_DEPTH * shadow) * (1 - cover), k = 3 * (i * size + j);
        for (let c = 0; c < 3; c++) picture[k + c] = picture[k + c] * keep + out[c] * cover;
      }
    }
  }
}
