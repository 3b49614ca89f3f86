// Connection to the server: OpenAI's Realtime protocol with the extension `moss`, resumed after a disconnect.

const KEY = "moss.key", SESSION = "moss.session";
// Tokens per second: as fast as people read along, so that they can see the model change its mind.
const PACE = 8;
const WAITS = [400, 800, 1500, 3000, 5000];
// WebSocket close codes: stream over, policy violation, all streams taken, resumed by another page.
const NORMAL = 1000, POLICY = 1008, LATER = 1013, TAKEN_OVER = 4001;

const stored = (name) => {
  try {
    return JSON.parse(sessionStorage.getItem(name));
  } catch {
    return null;
  }
};

export function store(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage is full or disabled: the page works without it.
  }
}

export { stored };

// Page time in seconds, which continues across reloads.
export const pageTime = () => (performance.timeOrigin + performance.now()) / 1000;

// Events: "state" {state, text}, "event" (a server event), "begin" (a new session), "key" (a key is needed).
export class Realtime extends EventTarget {
  constructor() {
    super();
    this.socket = null;
    this.session = stored(SESSION);
    this.wanted = false;
    this.tries = 0;
    this.timer = 0;
    // Stream time minus page time in seconds, estimated from the frame with the least delay.
    this.offset = this.session?.offset ?? null;
    addEventListener("online", () => this.wanted && !this.isOpen && this.open());
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN && this.ready;
  }

  get canResume() {
    return Boolean(this.session?.token);
  }

  // Current stream time in seconds; null while unknown.
  get now() {
    return this.offset === null ? null : pageTime() + this.offset;
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  state(state, text) {
    this.tell("state", { state, text });
  }

  connect() {
    this.wanted = true;
    if (!this.socket) this.open();
  }

  async open() {
    clearTimeout(this.timer);
    this.drop();
    this.state("connecting", this.session ? "Reconnecting" : "Connecting");
    const opening = (this.opening = {});
    const answer = await fetch("readyz").then((r) => r.json().then((body) => [r.status, body]), () => null).catch(() => null);
    if (opening !== this.opening || !this.wanted) return;
    if (!answer) return this.retry("Connection lost");
    if (answer[1].ready === false) return this.retry("The model is warming up", 1000);

    const url = new URL("v1/realtime", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this.resuming = this.canResume;
    if (this.resuming) {
      url.searchParams.set("session", this.session.id);
      url.searchParams.set("token", this.session.token);
      if (this.session.after) url.searchParams.set("after", this.session.after);
    }
    const key = stored(KEY);
    const socket = new WebSocket(url, key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]);
    this.socket = socket;
    this.ready = this.greeted = false;
    this.refusal = null;
    socket.onmessage = ({ data }) => socket === this.socket && this.receive(JSON.parse(data));
    socket.onclose = (event) => socket === this.socket && this.lost(event);
  }

  receive(event) {
    if (event.type === "session.created") {
      this.greeted = true;
      this.tries = 0;
      if (this.resuming) {
        this.ready = true;
        this.state("open", "Connected");
      } else {
        this.session = { id: event.session.id };
        this.tell("begin", event.session);
        const moss = { version: 1, frames: "binary", limits: { max_tokens_per_second: PACE } };
        this.send({ type: "session.update", session: { type: "realtime", moss } });
      }
    } else if (event.type === "session.updated") {
      if (event.session.moss) this.session.token = event.session.moss.token;
      this.ready = true;
      this.state("open", "Connected");
    } else if (event.type === "error" && !this.ready) {
      this.refusal = event.error;
    }
    if (event.event_id && this.session) this.session.after = event.event_id;
    this.tell("event", event);
  }

  lost({ code, wasClean }) {
    const { refusal, greeted } = this;
    this.socket = null;
    this.ready = false;
    if (!this.wanted) return this.state("idle", "Not connected");
    if (code === TAKEN_OVER) {
      this.wanted = false;
      return this.state("ended", "Open in another window");
    }
    if (refusal && refusal.code !== "no_free_stream" && this.resuming) {
      // The session has expired: start a new one.
      this.forget();
      this.tell("forgotten", refusal);
      return this.open();
    }
    if (code === LATER || refusal?.code === "no_free_stream") return this.retry("All streams are taken", 4000);
    if (code === NORMAL && wasClean && greeted) {
      this.forget();
      this.wanted = false;
      return this.state("ended", "The session is over");
    }
    if (!greeted && code !== 1012) this.checkKey();
    this.retry(code === POLICY ? "The connection was too slow" : "Connection lost");
  }

  async checkKey() {
    const answer = await fetch("v1/models", { headers: this.authorization }).catch(() => null);
    if (answer?.status === 401 || answer?.status === 403) {
      this.disconnect();
      this.tell("key");
    }
  }

  get authorization() {
    const key = stored(KEY);
    return key ? { Authorization: `Bearer ${key}` } : {};
  }

  useKey(key) {
    store(KEY, key);
    this.connect();
  }

  retry(text, wait = WAITS[Math.min(this.tries, WAITS.length - 1)]) {
    this.tries += 1;
    this.socket = null;
    this.state("waiting", `${text}. Trying again`);
    this.timer = setTimeout(() => this.wanted && this.open(), wait);
  }

  drop(code) {
    const socket = this.socket;
    this.socket = null;
    this.ready = false;
    if (socket) {
      socket.onmessage = socket.onclose = null;
      socket.close(code);
    }
  }

  // Ends the session for good.
  end() {
    this.wanted = false;
    clearTimeout(this.timer);
    this.opening = null;
    this.drop(NORMAL);
    this.forget();
    this.state("idle", "Not connected");
  }

  disconnect() {
    this.wanted = false;
    clearTimeout(this.timer);
    this.opening = null;
    this.drop();
    this.state("idle", "Not connected");
  }

  forget() {
    this.session = null;
    this.offset = null;
    store(SESSION, null);
  }

  // Stores the session and its clock offset, so that it can be resumed after a reload.
  save() {
    if (this.canResume) store(SESSION, { ...this.session, offset: this.offset });
  }

  send(event) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(event));
    return true;
  }

  ask(text) {
    const content = [{ type: "input_text", text }];
    const sent = this.send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
    return sent && this.send({ type: "response.create" });
  }

  cancel() {
    return this.send({ type: "response.cancel" });
  }

  // Sends a frame, an image file as an ArrayBuffer, with its stream time (NaN for now).
  frame(image, time) {
    // Backpressure: on a slow connection, drop frames instead of showing the past.
    if (!this.isOpen || this.socket.bufferedAmount > 500_000) return false;
    const message = new Uint8Array(8 + image.byteLength);
    new DataView(message.buffer).setFloat64(0, time);
    message.set(new Uint8Array(image), 8);
    this.socket.send(message);
    return true;
  }

  // Updates the clock offset from the time that the server gave to a frame, taken at page time `taken`. The
  // frame with the least delay is the most accurate; older estimates decay, since clocks drift.
  learn(time, taken) {
    const offset = time - taken;
    this.offset = this.offset === null ? offset : Math.min(this.offset + 0.005, offset);
  }
}
