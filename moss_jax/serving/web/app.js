// Puts the page together: sources, the connection, and what is shown of it.

import { pageTime, Realtime, store, stored } from "./realtime.js";
import { explain, openCamera, openScreen, takeFrame, takeThumb, Ticker } from "./sources.js";
import { Pad, Playground } from "./tabletop/playground.js";
import { Memory, Timeline } from "./timeline.js";
import { clock, spoken, Transcript } from "./transcript.js";

const PAGE = "moss.page";
const CHIPS = {
  playground: ["Describe what is happening.", "What is on the table?", "Tell me when the circle is gone.", "What has just happened?", "Just watch."],
  other: ["What do you see?", "Describe what is happening.", "Tell me when something changes."],
};
// Frames whose time the server says, to learn its clock: the first ones, then one in so many.
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
const ticker = new Ticker(showFrame);

let source = "playground";
let media = null; // the MediaStream of camera or screen, or the URL of a file
let answer = null; // the entry of the response in progress
let question = null; // the entry of the last one
let askedAt = null; // when the last question was asked, until its first word
let sent = []; // frames whose fate is not known: {time, taken, url}
let numberOfFrames = 0;
let resumes = stored("moss.session")?.token ? stored(PAGE) : null;

// ------------------------------------------------------------------------------------------- sources

function pictureElement() {
  return source === "playground" ? $("table") : media?.image ?? $("video");
}

async function chooseSource(name, { quiet = false } = {}) {
  if (name !== source) {
    stopWatching();
    closeMedia();
  }
  source = name;
  $("stage").dataset.source = name;
  for (const tab of document.querySelectorAll("[data-source][role=radio]")) {
    tab.setAttribute("aria-checked", String(tab.dataset.source === name));
    tab.tabIndex = tab.dataset.source === name ? 0 : -1;
  }
  $("playground").hidden = $("tools").hidden = name !== "playground";
  $("video-tools").hidden = name === "playground";
  $("pick-label").hidden = $("pick").hidden = name !== "file";
  $("video").hidden = name === "playground" || !media;
  const notes = { camera: "The camera's picture goes to this server, and nowhere else.", screen: "Choose a window or a screen to share.", file: "Choose a video or an image below, or drop one here." };
  note(name in notes && !media ? notes[name] : "");
  showChips();
  showRunning();
  if (!quiet) save();
}

function note(text) {
  $("stage-note").textContent = text;
  $("stage-note").hidden = !text;
}

function closeMedia() {
  if (media?.stream) for (const track of media.stream.getTracks()) track.stop();
  if (media?.url) URL.revokeObjectURL(media.url);
  media = null;
  $("video").srcObject = null;
  $("video").removeAttribute("src");
  $("video").hidden = true;
  document.querySelector("#stage > img")?.remove();
}

async function openMedia() {
  if (source === "playground" || media) return true;
  if (source === "file") {
    $("pick").click();
    return false;
  }
  try {
    const stream = await (source === "camera" ? openCamera() : openScreen());
    media = { stream };
    stream.getVideoTracks()[0].onended = () => {
      stopWatching();
      closeMedia();
      note("The source has ended.");
    };
    $("video").srcObject = stream;
    $("video").hidden = false;
    await $("video").play();
    note("");
    return true;
  } catch (error) {
    note(explain(error, source));
    return false;
  }
}

async function openFile(file) {
  if (!file) return;
  await chooseSource("file", { quiet: true });
  stopWatching();
  closeMedia();
  const url = URL.createObjectURL(file);
  try {
    if (file.type.startsWith("image/")) {
      const image = new Image();
      image.src = url;
      image.alt = "What the model sees";
      await image.decode();
      media = { url, image };
      $("stage").append(image);
    } else {
      media = { url };
      const video = $("video");
      video.src = url;
      video.loop = false;
      await new Promise((done, fail) => {
        video.onloadeddata = done;
        video.onerror = () => fail(new Error("This browser cannot play that file."));
      });
      video.hidden = false;
      video.onended = () => stopWatching();
    }
    note("");
    await startWatching();
  } catch (error) {
    closeMedia();
    note(error.message && error.name === "Error" ? error.message : "That file cannot be opened as a picture.");
  }
}

async function startWatching() {
  if (!(await openMedia())) return false;
  if (source === "file" && !media.image) await $("video").play();
  ticker.rate = source === "playground" ? 1 : Number($("rate").value);
  live.connect();
  ticker.start();
  showRunning();
  save();
  return true;
}

function stopWatching() {
  ticker.stop();
  if (source === "file") $("video").pause();
  showRunning();
  save();
}

function showRunning() {
  const running = ticker.isRunning;
  $("start").querySelector("span").textContent = running ? "Pause" : numberOfFrames ? "Go on watching" : "Start watching";
  $("start").classList.toggle("running", running);
  $("start").querySelector("path").setAttribute("d", running ? "M7 5h3v14H7zM14 5h3v14h-3z" : "M7 4l13 8-13 8z");
  $("seeing").hidden = !running;
  $("stage").classList.toggle("running", running);
}

async function showFrame() {
  if (!live.isOpen) return;
  const element = pictureElement(), taken = pageTime();
  const image = await takeFrame(element);
  if (!image || !live.isOpen || !ticker.isRunning) return;
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
    // A question before the first frame, when the stream's clock was not known.
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
    const words = { shutdown: saved ? "The server ends; the session is saved." : "The server ends.", finished: "The session is over." };
    remark(words[reason] ?? `The session has ended: ${reason.replaceAll("_", " ")}.`);
  },
  error({ error }) {
    if (["invalid_image", "invalid_frame", "invalid_time"].includes(error.code)) sent.shift();
    if (error.code === "response_cancel_not_active") return;
    if (live.greeted) remark(error.message);
  },
};

// The frame that was sent with this time, or the first one that left the time to the server.
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
    if (state === "ended") stopWatching();
  } else {
    mood(answer ? "talking" : "listening");
    if (ticker.isRunning) ticker.start();
    if (waiting) ask(waiting);
  }
  $("prompt").disabled = false;
});

// A new session has a clock of its own.
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
  // Under the picture, where a phone has no room for what is said beside it.
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
  if (name === "listening" && !ticker.isRunning && !numberOfFrames) name = "idle";
  $("mood").dataset.mood = name;
  $("mood").querySelector("span").textContent = words[name];
  $("stop").disabled = !["thinking", "talking"].includes(name);
}

// ------------------------------------------------------------------------------------------- asking

let waiting = ""; // a question that was asked before there was a connection

async function ask(text) {
  $("welcome").hidden = true;
  if (!live.isOpen) {
    waiting = text;
    if (!ticker.isRunning) await startWatching();
    else live.connect();
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
  // On the table, Escape lets go of what was chosen.
  const escapes = event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]");
  if (escapes && !$("stop").disabled) live.cancel();
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("prompt").focus();
  }
});

function showChips() {
  const texts = CHIPS[source] ?? CHIPS.other;
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
    // Some browsers on phones notify through service workers alone.
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) document.title = TITLE;
});

function flash() {
  $("stage").classList.remove("flash");
  requestAnimationFrame(() => $("stage").classList.add("flash"));
}

// --------------------------------------------------------------------------- source and theme buttons

const tabs = [...document.querySelectorAll("[data-source][role=radio]")];
for (const tab of tabs) {
  tab.onclick = () => chooseSource(tab.dataset.source);
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = tabs.at((tabs.indexOf(tab) + step) % tabs.length);
    next.focus();
    chooseSource(next.dataset.source);
  };
}
$("start").onclick = () => (ticker.isRunning ? stopWatching() : startWatching());
$("rate").onchange = () => {
  ticker.rate = Number($("rate").value);
  if (ticker.isRunning) ticker.start();
};
$("pick").onchange = () => {
  openFile($("pick").files[0]);
  $("pick").value = "";
};
$("stage").addEventListener("dragover", (event) => event.preventDefault());
$("stage").addEventListener("drop", (event) => {
  event.preventDefault();
  openFile(event.dataTransfer.files[0]);
});
playground.addEventListener("change", () => save());
playground.addEventListener("say", ({ detail }) => say(detail));

$("new").onclick = () => {
  const running = ticker.isRunning;
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
  if (running) live.connect();
  showRunning();
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
    // Storage is off: until the next reload, then.
  }
  showTheme();
};
dark.addEventListener("change", showTheme);

// ------------------------------------------------------------------------------- reloads of the page

let savedAt = 0;

function save(now = false) {
  if (!now && performance.now() - savedAt < 2000) return;
  savedAt = performance.now();
  live.save();
  const entries = transcript.entries.slice(-60);
  store(PAGE, {
    source, running: ticker.isRunning, table: playground.state, numberOfFrames, entries,
    answer: answer && { id: answer.id, asked: answer.asked, time: answer.time, at: entries.indexOf(answer.entry) },
    // Thumbnails are too much to be written all the time.
    frames: now ? timeline.state : [],
  });
}

addEventListener("pagehide", () => save(true));
addEventListener("pageshow", (event) => event.persisted && live.wanted && live.connect());

function restore() {
  const page = stored(PAGE);
  if (page?.table) playground.state = page.table;
  else playground.begin();
  if (!resumes) return chooseSource(page?.source ?? "playground", { quiet: true });
  numberOfFrames = page.numberOfFrames;
  for (const frame of page.frames) {
    const { fate } = frame;
    timeline.addFrame(frame);
    if (fate) timeline.setFate(frame, fate);
  }
  for (const entry of page.entries) timeline.addWords(transcript.add(entry));
  if (page.answer) answer = { ...page.answer, entry: transcript.entries[page.answer.at] };
  $("welcome").hidden = page.entries.length > 0;
  chooseSource(page.source, { quiet: true });
  live.connect();
  if (page.running && ["playground", "camera"].includes(page.source)) startWatching();
}

restore();
showTheme();
showRunning();
