// Transcript of questions and answers as they stream: corrections strike out text, interruptions are marked.

// Maximum number of entries on the page.
const MOST = 200;

export const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds ?? 0)), parts = [Math.floor(whole / 60) % 60, whole % 60];
  const text = parts.map((n) => String(n).padStart(2, "0")).join(":");
  return whole >= 3600 ? `${Math.floor(whole / 3600)}:${text}` : text.replace(/^0/, "");
};

// The text that is left after corrections, capitalised, since corrections begin in lower case.
export function spoken({ text, struck }) {
  let left = "", at = 0;
  for (const { from, to, end } of struck) {
    left += text.slice(at, Math.max(at, from));
    at = Math.max(at, end ?? to);
  }
  left += text.slice(at);
  return struck.length ? left.charAt(0).toUpperCase() + left.slice(1) : left;
}

export class Transcript {
  constructor(log, entries) {
    this.log = log;
    this.list = entries;
    this.entries = [];
    this.sticks = true;
    log.addEventListener("scroll", () => (this.sticks = log.scrollHeight - log.scrollTop - log.clientHeight < 40));
  }

  // Entries: {kind: "prompt" | "answer" | "note", text, time, struck: [{from, to, end}], asked, status, alert}.
  add(entry) {
    entry = { struck: [], status: "done", ...entry };
    const node = document.createElement("li");
    node.className = `entry ${entry.kind}`;
    const time = document.createElement("time");
    const body = document.createElement("p");
    node.append(time, body);
    this.list.append(node);
    this.entries.push(entry);
    this.nodes ??= new WeakMap();
    this.nodes.set(entry, node);
    while (this.entries.length > MOST) this.nodes.get(this.entries.shift()).remove();
    this.update(entry);
    return entry;
  }

  update(entry) {
    const node = this.nodes.get(entry), [time, body] = node.children;
    time.textContent = entry.time === null || entry.time === undefined ? "" : clock(entry.time);
    node.dataset.status = entry.status;
    node.classList.toggle("unasked", entry.kind === "answer" && entry.asked === false);
    node.classList.toggle("alert", Boolean(entry.alert));
    const parts = [];
    let at = 0;
    for (const { from, to, end } of entry.struck) {
      if (from > at) parts.push(entry.text.slice(at, from));
      const gone = document.createElement("del");
      gone.textContent = entry.text.slice(Math.max(at, from), to);
      const wait = document.createElement("span");
      wait.className = "wait";
      wait.textContent = entry.text.slice(to, end).replace(/^ - /, " ");
      parts.push(gone, wait);
      at = end;
    }
    parts.push(entry.text.slice(at));
    if (entry.status === "cut") {
      const cut = document.createElement("span");
      cut.className = "cut";
      cut.textContent = "interrupted";
      parts.push(" ", cut);
    }
    body.replaceChildren(...parts);
    if (this.sticks) this.log.scrollTop = this.log.scrollHeight;
  }

  clear() {
    this.entries = [];
    this.list.replaceChildren();
  }
}
