// Handwriting on the card. The world's digits are 8x8 images made from writing scaled to 32x32 pixels;
// strokes are converted in the same way.

const FINE = 32, COARSE = 8;
// At 32 pixels: the maximum width of a digit, the pen widths, and the ink coverage of the world's digits. The
// thinnest pen with that coverage is used, so that an 8 keeps its holes and a 1 its weight.
const WIDEST = 25, PENS = [3.6, 4.2, 4.8, 5.4, 6], SHARE = 0.27;

// Converts strokes, lists of points [x, y] in any unit, to ink: 8x8 in [0, 1].
export function inkOf(strokes) {
  let ink;
  for (const pen of PENS) {
    ink = draw(strokes, pen);
    if (ink.reduce((a, b) => a + b) / ink.length >= SHARE) break;
  }
  return ink;
}

function draw(strokes, pen) {
  const points = strokes.flat();
  const [left, right] = extent(points.map((p) => p[0])), [top, bottom] = extent(points.map((p) => p[1]));
  const width = Math.max(right - left, 1e-6), height = Math.max(bottom - top, 1e-6);
  // As tall as the image, but flat strokes are not stretched beyond its width.
  const tall = Math.min((FINE - pen) / height, (1.15 * WIDEST) / width);
  const wide = Math.min(tall, (WIDEST - pen) / width);
  const place = ([x, y]) => [
    FINE / 2 + (x - (left + right) / 2) * wide,
    FINE / 2 + (y - (top + bottom) / 2) * tall,
  ];
  const segments = strokes.flatMap((stroke) => {
    const placed = stroke.map(place);
    return placed.length > 1 ? placed.slice(1).map((p, k) => [placed[k], p]) : [[placed[0], placed[0]]];
  });
  const ink = new Float32Array(COARSE * COARSE), each = (COARSE * COARSE) / (FINE * FINE);
  for (let i = 0; i < FINE; i++) {
    for (let j = 0; j < FINE; j++) {
      if (segments.some((segment) => distance(j + 0.5, i + 0.5, segment) <= pen / 2)) {
        ink[Math.floor((i * COARSE) / FINE) * COARSE + Math.floor((j * COARSE) / FINE)] += each;
      }
    }
  }
  return ink;
}

function extent(values) {
  return [Math.min(...values), Math.max(...values)];
}

function distance(x, y, [[x0, y0], [x1, y1]]) {
  const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
  const t = length ? Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / length, 0), 1) : 0;
  return Math.hypot(x - x0 - t * dx, y - y0 - t * dy);
}

const curve = (...points) => points;

// The strokes of each digit in a 100x100 box, for digits typed on the keyboard.
export const DIGITS = [
  [curve([56, 3], [42, 6], [31, 20], [26, 42], [27, 64], [35, 86], [50, 96], [64, 88], [73, 68], [75, 44], [69, 20], [58, 5], [50, 3])],
  [curve([34, 24], [46, 14], [55, 3], [55, 30], [54, 66], [54, 97])],
  [curve([29, 24], [33, 10], [47, 3], [62, 8], [68, 24], [62, 42], [48, 62], [33, 80], [26, 95], [46, 94], [74, 95])],
  [curve([30, 12], [46, 3], [62, 7], [69, 22], [60, 38], [46, 46], [62, 51], [72, 66], [69, 84], [53, 96], [36, 94], [27, 84])],
  [curve([50, 3], [40, 26], [30, 48], [24, 62], [48, 61], [76, 58]), curve([63, 34], [60, 60], [57, 97])],
  [curve([69, 5], [50, 5], [34, 6], [32, 24], [30, 45], [46, 40], [62, 46], [70, 62], [66, 82], [52, 95], [36, 95], [27, 87])],
  [curve([58, 3], [44, 18], [34, 40], [28, 64], [32, 86], [48, 97], [65, 91], [72, 74], [64, 60], [48, 58], [34, 68])],
  [curve([27, 8], [46, 6], [72, 4], [66, 26], [56, 52], [48, 76], [43, 97]), curve([36, 48], [54, 47], [71, 45])],
  [curve([64, 14], [50, 3], [36, 10], [34, 26], [46, 42], [62, 58], [69, 78], [58, 95], [42, 95], [31, 80], [38, 60], [54, 44], [65, 28], [64, 14])],
  [curve([67, 18], [54, 4], [38, 9], [31, 27], [38, 44], [54, 46], [66, 34], [68, 18], [68, 48], [63, 76], [50, 95], [33, 92])],
];
