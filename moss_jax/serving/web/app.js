// Entry point of the page: connects sources, connection and views.

import { pageTime, Realtime, store, stored } from "./realtime.js";
import { takeFrame, takeThumb } from "./sources.js";
import { Stage } from "./stage.js";
import { Pad, Playground } from "./tabletop/playground.js";
import { Memory, Timeline } from "./timeline.js";
import { clock, spoken, Transcript } from "./transcript.js";

const PAGE = "moss.page";
const CHIPS = {
  playground: ["Describe what is happening.", "What is on the table?", "Tell me when the circle is gone.", "What has just happened?", "Just watch."],
  other: ["What do you see?", "Describe what is happening.", "Tell me when something changes."],
};
// Frames sent without a time, to learn the stream's clock: the first ones, then one in so many.
const LEARN_FIRST = 3, LEARN_EVERY = 30;

const $ = (id) => document.getElementById(id);

const live = new Realtime();
const transcript = new Transcript($("log"), $("entries"));
const timeline = new Timeline({
  scroller: $("scroller"), track: $("track"), thumbs: $("thumbs"), said: $("said"), empty: $("past-empty"), latest: $("latest"),
});
const memory = new Memory($("memory"), $("legend"));
const pad = new Pad({ dialog: $("pad"), paper: $("paper"), clear: $("pad-clear"), cancel: $("pad-cancel"), done: $("pad-done") });
const playground = new Playground(
  {
    canvas: $("table"), table: $("playground"), cells: $("cells"), tray: $("tray"), swatches: $("swatches"),
    hint: $("hint"), write: $("write"), cover: $("cover"), remove: $("remove"),
  },
  pad,
);
const stage = new Stage(showFrame);

let answer = null; // transcript entry of the response in progress
let question = null; // transcript entry of the last question
let askedAt = null; // time of the last question, until its first text
let sent = []; // frames whose fate is unknown: {time, taken, url}
let numberOfFrames = 0;
let resumes = stored("moss.session")?.token ? stored(PAGE) : null;

// -------------------------------------------------------------------------------- what the model sees

stage.addEventListener("source", () => {
  showChips();
  save();
});
stage.addEventListener("change", () => {
  if (stage.isRunning) live.connect();
  save();
});

async function showFrame() {
  if (!live.isOpen) return;
  const element = stage.picture, taken = pageTime();
  const image = await takeFrame(element);
  if (!image || !live.isOpen || !stage.isRunning) return;
  const learns = live.offset === null || numberOfFrames < LEARN_FIRST || numberOfFrames % LEARN_EVERY === 0;
  const time = learns ? NaN : Math.max(0, taken + live.offset);
  if (!live.frame(image, time)) return;
  numberOfFrames += 1;
  sent.push({ time, taken, url: takeThumb(element) });
  $("seeing").classList.remove("beat");
  requestAnimationFrame(() => $("seeing").classList.add("beat"));
}

// ----------------------------------------------------------------------------------------- what comes

const on = {
  "conversation.item.added"({ moss }) {
    const { frame } = moss ?? {};
    if (!frame) return;
    const shown = take(frame.time);
    if (!shown) return;
    if (Number.isNaN(shown.time)) live.learn(frame.time, shown.taken);
    shown.time = frame.time;
    shown.index = frame.index;
    timeline.addFrame(shown);
    set("queue", frame.queued);
  },
  "conversation.item.done"({ moss }) {
    for (const { index, fate } of moss?.frames ?? (moss?.frame ? [moss.frame] : [])) {
      const frame = timeline.frames.findLast((each) => each.index === index);
      if (frame) timeline.setFate(frame, fate);
    }
  },
  "response.created"({ response, moss }) {
    answer = { id: response.id, asked: moss?.asked ?? true, time: moss?.time ?? live.now };
    // The question was asked before the first frame, when the stream's clock was still unknown.
    if (answer.asked && question?.time === null) {
      question.time = answer.time;
      transcript.update(question);
      timeline.addWords(question);
    }
    mood("thinking");
  },
  "response.output_text.delta"({ response_id, delta, moss }) {
    if (answer?.id !== response_id) answer = { id: response_id, asked: true };
    if (!answer.entry) {
      answer.entry = transcript.add({ kind: "answer", id: response_id, text: "", time: moss?.time ?? answer.time, asked: answer.asked, status: "saying" });
      timeline.addWords(answer.entry);
      if (askedAt !== null && answer.asked) {
        set("first", `${Math.round(performance.now() - askedAt)} ms`);
        askedAt = null;
      }
    }
    const { entry } = answer;
    if (moss?.takes_back) {
      const from = moss.from ?? 0, to = entry.text.length;
      entry.struck.push({ from, to, end: to + delta.length });
    }
    entry.text += delta;
    if (!entry.alert && /^Now!/.test(spoken(entry))) {
      entry.alert = true;
      flash();
    }
    show(entry);
    mood("talking");
  },
  "response.done"({ response }) {
    const entry = answer?.id === response.id ? answer.entry : null;
    answer = null;
    if (entry) {
      entry.status = { cancelled: "cut", incomplete: "cut" }[response.status] ?? "done";
      show(entry);
      const text = spoken(entry).trim();
      say(text);
      if (entry.asked === false || entry.alert) announceOutside(entry, text);
    }
    mood("listening");
    save();
  },
  "moss.silence"() {
    if (!answer?.entry) mood("listening");
  },
  "moss.counters"(event) {
    const { counters, latency, fps, queue, memory: items } = event;
    set("latency", latency == null ? "–" : `${Math.round(latency * 1000)} ms`);
    set("fps", Number(fps).toFixed(1));
    set("queue", queue);
    set("seen", counters.frames);
    set("passed", counters.frames_dropped + counters.frames_still + counters.frames_alike + counters.frames_rate);
    set("time", clock(event.time));
    set("text", `${event.text_tokens} of ${event.text_capacity}`);
    if (items) {
      memory.set(items);
      timeline.setMemory(items);
    }
    save();
  },
  "moss.end"({ reason, saved }) {
    const words = { shutdown: saved ? "The server is shutting down; the session is saved." : "The server is shutting down.", finished: "The session is over." };
    remark(words[reason] ?? `The session has ended: ${reason.replaceAll("_", " ")}.`);
  },
  error({ error }) {
    if (["invalid_image", "invalid_frame", "invalid_time"].includes(error.code)) sent.shift();
    if (error.code === "response_cancel_not_active") return;
    if (live.greeted) remark(error.message);
  },
};

// Removes and returns the frame sent with this time, or the first one sent without a time.
function take(time) {
  const at = sent.findIndex((frame) => frame.time === time || Number.isNaN(frame.time));
  return at < 0 ? null : sent.splice(0, at + 1).at(-1);
}

live.addEventListener("event", ({ detail }) => {
  if (detail.type === "session.created") {
    $("model").textContent = `Model: ${detail.session.model}`;
    if (detail.session.moss?.resumed?.missed) {
      cutAnswer();
      remark("Some of what it said meanwhile is lost.");
    }
  }
  on[detail.type]?.(detail);
});

live.addEventListener("state", ({ detail: { state, text } }) => {
  $("link").dataset.state = state;
  $("link").querySelector("span").textContent = text;
  if (state !== "open") {
    sent = [];
    if (state !== "connecting") mood("idle");
    if (state === "ended") stage.stop();
  } else {
    mood(answer ? "talking" : "listening");
    if (stage.isRunning) stage.tick();
    if (waiting) ask(waiting);
  }
  $("prompt").disabled = false;
});

// A new session has its own clock.
live.addEventListener("begin", () => {
  numberOfFrames = 0;
  cutAnswer();
  timeline.clear();
  memory.set([]);
});

live.addEventListener("forgotten", () => {
  remark("The session could not be resumed. A new one begins, and remembers nothing.");
});

live.addEventListener("key", () => $("key").showModal());
$("key").addEventListener("close", () => $("key-value").value && live.useKey($("key-value").value));

function cutAnswer() {
  if (answer?.entry) {
    answer.entry.status = "cut";
    show(answer.entry);
  }
  answer = null;
}

function show(entry) {
  // The caption under the picture, for phones, which have no room for the transcript beside it.
  $("caption").textContent = spoken(entry).trim();
  transcript.update(entry);
  timeline.update(entry);
}

function remark(text) {
  $("welcome").hidden = true;
  transcript.add({ kind: "note", text, time: null });
  say(text);
}

function say(text) {
  $("announce").textContent = text;
}

function set(name, value) {
  document.querySelector(`[data-figure=${name}]`).textContent = value;
}

function mood(name) {
  const words = { idle: "Quiet", thinking: "Thinking", talking: "Talking", listening: "Listening" };
  if (name === "listening" && !stage.isRunning && !numberOfFrames) name = "idle";
  $("mood").dataset.mood = name;
  $("mood").querySelector("span").textContent = words[name];
  $("stop").disabled = !["thinking", "talking"].includes(name);
}

// ------------------------------------------------------------------------------------------- asking

let waiting = ""; // a question asked before the connection is open

async function ask(text) {
  $("welcome").hidden = true;
  if (!live.isOpen) {
    waiting = text;
    if (stage.isRunning) live.connect();
    else await stage.start();
    return;
  }
  waiting = "";
  if (!live.ask(text)) return;
  askedAt = performance.now();
  question = transcript.add({ kind: "prompt", text, time: live.now });
  transcript.sticks = true;
  timeline.addWords(question);
  mood("thinking");
  save();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  $("prompt").value = "";
  if (text) ask(text);
});
$("stop").onclick = () => live.cancel();
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea") || document.querySelector("dialog[open]");
  // On the table, Escape clears the selection instead.
  const escapes = event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]");
  if (escapes && !$("stop").disabled) live.cancel();
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("prompt").focus();
  }
});

function showChips() {
  const texts = CHIPS[stage.source] ?? CHIPS.other;
  $("chips").replaceChildren(
    ...texts.map((text) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = text;
      chip.onclick = () => ask(text);
      return chip;
    }),
  );
}

// ------------------------------------------------------------------------------------ notifications

let notifies = false;

$("notify").onclick = async () => {
  if (notifies) notifies = false;
  else if (!("Notification" in window)) return remark("This browser has no notifications.");
  else notifies = (await Notification.requestPermission()) === "granted";
  if (!notifies && Notification.permission === "denied") remark("Notifications are blocked for this page in the browser's settings.");
  $("notify").setAttribute("aria-pressed", String(notifies));
};

const TITLE = document.title;

function announceOutside(entry, text) {
  if (!document.hidden && document.hasFocus()) return;
  if (document.hidden) document.title = `● ${text}`;
  if (!notifies) return;
  try {
    const shown = new Notification(entry.alert ? "Now!" : "moss_jax", { body: text, tag: "moss", icon: timeline.frames.at(-1)?.url });
    shown.onclick = () => {
      focus();
      shown.close();
    };
  } catch {
    // Some mobile browsers support notifications only through service workers.
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) document.title = TITLE;
});

function flash() {
  $("stage").classList.remove("flash");
  requestAnimationFrame(() => $("stage").classList.add("flash"));
}

// ---------------------------------------------------------------------------- a new session, the theme

playground.addEventListener("change", () => save());
playground.addEventListener("say", ({ detail }) => say(detail));

$("new").onclick = () => {
  live.end();
  answer = null;
  waiting = "";
  transcript.clear();
  timeline.clear();
  memory.set([]);
  for (const figure of document.querySelectorAll("[data-figure]")) figure.textContent = "–";
  numberOfFrames = 0;
  $("welcome").hidden = false;
  mood("idle");
  stage.hasBegun = stage.isRunning;
  stage.show();
  if (stage.isRunning) live.connect();
  save();
};

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : dark.matches;
}
function showTheme() {
  $("theme").querySelector("span").textContent = isDark() ? "Light" : "Dark";
  memory.draw();
}
$("theme").onclick = () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("moss.theme", theme);
  } catch {
    // Storage is disabled: the theme lasts until the next reload.
  }
  showTheme();
};
dark.addEventListener("change", showTheme);

// --------------------------------------------------------------------------- persistence across reloads

let savedAt = 0;

function save(now = false) {
  if (!now && performance.now() - savedAt < 2000) return;
  savedAt = performance.now();
  live.save();
  const entries = transcript.entries.slice(-60);
  store(PAGE, {
    source: stage.source, running: stage.isRunning, table: playground.state, numberOfFrames, entries,
    answer: answer && { id: answer.id, asked: answer.asked, time: answer.time, at: entries.indexOf(answer.entry) },
    // Thumbnails are too large to be saved each time.
    frames: now ? timeline.state : [],
  });
}

addEventListener("pagehide", () => save(true));
addEventListener("pageshow", (event) => event.persisted && live.wanted && live.connect());

function restore() {
  const page = stored(PAGE);
  if (page?.table) playground.state = page.table;
  else playground.begin();
  if (!resumes) return stage.choose(page?.source ?? "playground");
  numberOfFrames = page.numberOfFrames;
  for (const frame of page.frames) {
    const { fate } = frame;
    timeline.addFrame(frame);
    if (fate) timeline.setFate(frame, fate);
  }
  for (const entry of page.entries) timeline.addWords(transcript.add(entry));
  if (page.answer) answer = { ...page.answer, entry: transcript.entries[page.answer.at] };
  $("welcome").hidden = page.entries.length > 0;
  stage.hasBegun = true;
  stage.choose(page.source);
  live.connect();
  // Sources that need a user gesture are not restarted.
  if (page.running && ["playground", "camera"].includes(page.source)) stage.start();
}

restore();
showTheme();
