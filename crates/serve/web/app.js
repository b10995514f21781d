// The playground. Conversations are kept in this browser; what the model remembers of them is kept by the
// server as a session. A session that the server has no more is begun again from the text that is here.
"use strict";

const $ = (id) => document.getElementById(id);
const STORE = "mmfree.conversations";
const SETTINGS = ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "system"];
const EXAMPLES = {
  text: ["Once upon a time, in a village by the sea,", "The old lighthouse keeper had a secret:", "It was a dark night when the letter came.", "Chapter I. In which our hero leaves home"],
  chat: ["Tell me about the sea.", "Who lives in the old house?", "What did you do this morning?", "Tell me a story about a fox."],
};

const state = { conversations: [], current: null, model: null, running: null };

// ---- storage

function load(key, fallback) {
  try { return JSON.parse(localStorage.getItem(key)) ?? fallback; } catch { return fallback; }
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ conversations: state.conversations, current: state.current?.id }));
  } catch {
    notice("This browser's storage is full: delete some conversations.");
  }
}

const newId = () => "web-" + Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

function newConversation(mode) {
  const empty = state.conversations.find((c) => c.entries.length === 0);
  if (empty) return empty;
  const conversation = { id: newId(), title: "", mode, session: newId(), entries: [] };
  state.conversations.unshift(conversation);
  return conversation;
}

// ---- requests

function headers(extra) {
  const key = $("key").value.trim();
  return key ? { ...extra, Authorization: "Bearer " + key } : { ...extra };
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      state.model = null;
      $("model").textContent = "This server wants an API key.";
      showSettings(true);
      $("key").focus();
      return;
    }
    if (!response.ok) throw new Error(await failure(response));
    state.model = (await response.json()).data[0];
    const name = document.createElement("b");
    name.textContent = state.model.id;
    $("model").replaceChildren(name, `${bytes(state.model.state_bytes)} a conversation`);
    $("max_tokens").max = Math.min(1024, state.model.max_tokens);
  } catch {
    $("model").textContent = "The server cannot be reached.";
  }
}

function settings() {
  const number = (id) => Number($(id).value);
  const body = {
    temperature: number("temperature"), top_p: number("top_p"),
    repetition_penalty: number("repetition_penalty"), max_tokens: number("max_tokens"),
  };
  if ($("seed").value !== "") body.seed = number("seed");
  return body;
}

// The part of a conversation that the server's session does not have: everything, if there is none.
async function body(conversation) {
  const { entries, mode } = conversation;
  let known = false;
  if (entries.some((entry) => entry.role === "model") && !conversation.stale) {
    const response = await fetch("v1/sessions/" + conversation.session, { headers: headers(), signal: state.running.abort.signal });
    known = response.ok;
  }
  if (!known) conversation.session = newId();
  conversation.stale = false;
  const last = entries.at(-1);
  const common = { ...settings(), model: state.model?.id, session_id: conversation.session, stream: true, stream_options: { include_usage: true } };
  if (mode === "text") {
    const prompt = known ? (last.role === "user" ? last.text : "") : entries.map((entry) => entry.text).join("");
    return { path: "v1/completions", body: { ...common, prompt } };
  }
  const role = { user: "user", model: "assistant" };
  let messages = (known ? [last] : entries).map((entry) => ({ role: role[entry.role], content: entry.text }));
  const system = $("system").value.trim();
  if (!known && system) messages = [{ role: "system", content: system }, ...messages];
  return { path: "v1/chat/completions", body: { ...common, messages } };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write() {
  const conversation = state.current;
  const { entries, mode } = conversation;
  const text = $("input").value;
  if (state.running || (mode === "chat" && !text.trim()) || (!text && entries.length === 0)) return;
  const before = entries.length;
  if (text) {
    const last = entries.at(-1);
    const needsSpace = mode === "text" && last && !/\s$/.test(last.text) && !/^[\s.,;:!?)]/.test(text);
    entries.push({ role: "user", text: (needsSpace ? " " : "") + text });
    if (!conversation.title) conversation.title = text.trim().slice(0, 60);
  }
  $("input").value = "";
  notice("");
  const abort = new AbortController();
  const started = performance.now();
  const run = (state.running = { abort, conversation });
  let reply = null;
  let first = 0;
  let tokens = 0;
  render();
  try {
    const request = await body(conversation);
    const response = await fetch(request.path, {
      method: "POST", signal: abort.signal,
      headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(request.body),
    });
    if (!response.ok) throw new Error(await failure(response));
    reply = { role: "model", text: "" };
    // Not part of what is kept.
    Object.defineProperty(reply, "progress", { value: {} });
    entries.push(reply);
    render();
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      const piece = choice?.text ?? choice?.delta?.content ?? "";
      if (piece) {
        first ||= performance.now();
        tokens += 1;
        reply.text += piece;
        paint(reply, tokens, first);
      }
      if (event.usage) reply.usage = event.usage;
      if (event.session) reply.session = event.session;
    }
    const ended = performance.now();
    // What came all at once, as to a tab that was busy, is measured from the question.
    const seconds = (ended - (first && first < ended ? first : started)) / 1000;
    const count = reply.usage?.completion_tokens ?? tokens;
    reply.stats = {
      tokens: count, speed: count > 1 ? (count - 1) / seconds : 0,
      first: Math.round((first || ended) - started),
      state: reply.session?.state_bytes ?? state.model?.state_bytes, seen: reply.session?.tokens_seen,
    };
    delete reply.usage;
    delete reply.session;
  } catch (error) {
    // The server keeps no part of a turn: the next one tells it everything that is here.
    conversation.stale = true;
    if (reply && reply.text) {
      reply.stats = { tokens, stopped: true };
    } else {
      entries.length = before;
      if (!entries.length) conversation.title = "";
      if (state.current === conversation) $("input").value ||= text;
    }
    if (error.name !== "AbortError") notice(error.message === "Failed to fetch" ? "The server cannot be reached." : error.message);
  }
  if (state.running === run) state.running = null;
  save();
  render();
  status(reply?.stats?.stopped ? "Stopped." : reply ? "Done." : "");
  if (matchMedia("(hover: hover)").matches) $("input").focus();
}

function stop() {
  state.running?.abort.abort();
}

// ---- the page

const bytes = (n) => (n < 1e6 ? `${Math.round(n / 1000)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function status(text) {
  $("status").textContent = text;
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function statsNode({ tokens, speed, first, state: size, seen, stopped }) {
  const node = element("p", "stats");
  const add = (text) => node.append(element("span", "", text));
  add(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (stopped) add("stopped");
  if (speed) add(`${Math.round(speed)} tokens/s`);
  if (first !== undefined) add(`first after ${first} ms`);
  if (size) add(`state ${bytes(size)}${seen ? ` for ${seen} tokens` : ""}`);
  return node;
}

function isAtEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

// Shows what is new of a text, once a frame however fast it comes.
function paint(reply, tokens, first) {
  Object.assign(reply.progress, { tokens, first });
  if (reply.progress.isPlanned) return;
  reply.progress.isPlanned = true;
  requestAnimationFrame(() => {
    reply.progress.isPlanned = false;
    const node = reply.node?.firstChild;
    if (state.running?.conversation !== state.current || !node?.isConnected) return;
    const follows = isAtEnd();
    node.appendData(reply.text.slice(node.length));
    const seconds = (performance.now() - reply.progress.first) / 1000;
    if (reply.progress.tokens > 4 && seconds > 0) status(`${Math.round((reply.progress.tokens - 1) / seconds)} tokens/s`);
    if (follows) $("log").scrollTop = $("log").scrollHeight;
  });
}

function renderLog() {
  const { entries, mode } = state.current;
  const log = $("log");
  log.className = "log " + (mode === "chat" ? "chat" : "document");
  if (!entries.length) {
    const welcome = element("div", "welcome");
    const icon = element("img");
    Object.assign(icon, { src: "icon.svg", alt: "", width: 48, height: 48 });
    const words = mode === "chat"
      ? ["Talk with the model", state.model?.has_chat_template === false
        ? "This model was not trained to chat: it plays along, in the manner of the books it has read." : "What was said stays in a state of some kilobytes, however long you talk."]
      : ["Begin a text, the model writes on", "It remembers everything that it has read in a state of some kilobytes, however long the text becomes."];
    const examples = element("div", "examples");
    for (const example of EXAMPLES[mode]) {
      const button = element("button", "", example);
      button.type = "button";
      button.addEventListener("click", () => { $("input").value = example; write(); });
      examples.append(button);
    }
    welcome.append(icon, element("h2", "", words[0]), element("p", "", words[1]), examples);
    log.replaceChildren(welcome);
    return;
  }
  log.replaceChildren(...entries.map((entry, at) => {
    const isRunning = state.running?.conversation === state.current && at === entries.length - 1 && entry.role === "model";
    const node = element("article", `entry ${entry.role}${isRunning ? " running" : ""}`);
    const text = element("div", "text");
    const startsLine = entry.role === "user" && Boolean(entries[at - 1]?.stats);
    text.append(document.createTextNode(startsLine ? entry.text.trimStart() : entry.text));
    if (mode === "chat") node.setAttribute("aria-label", entry.role === "user" ? "You" : "Model");
    node.append(text);
    Object.defineProperty(entry, "node", { value: text, configurable: true, enumerable: false, writable: true });
    if (entry.stats) node.append(statsNode(entry.stats));
    return node;
  }));
  log.scrollTop = log.scrollHeight;
}

function renderList() {
  $("list").replaceChildren(...state.conversations.map((conversation) => {
    const item = element("li");
    const title = conversation.title || "New conversation";
    const open = element("button", "open", title);
    open.type = "button";
    if (conversation === state.current) {
      item.dataset.current = "";
      open.setAttribute("aria-current", "true");
    }
    open.addEventListener("click", () => select(conversation));
    const remove = element("button", "delete");
    remove.type = "button";
    remove.setAttribute("aria-label", `Delete ${title}`);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 20 20");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10");
    svg.append(path);
    remove.append(svg);
    remove.addEventListener("click", () => forget(conversation));
    item.append(open, remove);
    return item;
  }));
}

function render() {
  const conversation = state.current;
  const isRunning = state.running !== null;
  const isText = conversation.mode === "text";
  $("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} · mmfree` : "mmfree";
  for (const radio of document.getElementsByName("mode")) {
    radio.checked = radio.value === conversation.mode;
    radio.disabled = conversation.entries.length > 0;
  }
  $("input").placeholder = !isText ? "Write a message…" : conversation.entries.length ? "Go on, or add something…" : "Begin a text, and the model writes on…";
  $("send").querySelector("span").textContent = isText ? "Write on" : "Send";
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  renderLog();
  renderList();
}

function select(conversation) {
  state.current = conversation;
  showSidebar(false);
  notice("");
  status("");
  save();
  render();
  $("input").focus();
}

function forget(conversation) {
  if (state.running?.conversation === conversation) stop();
  fetch("v1/sessions/" + conversation.session, { method: "DELETE", headers: headers() }).catch(() => {});
  state.conversations = state.conversations.filter((other) => other !== conversation);
  if (state.current === conversation) state.current = state.conversations[0] ?? newConversation(conversation.mode);
  save();
  render();
  $("new").focus();
}

function showSidebar(isOpen) {
  $("sidebar").classList.toggle("is-open", isOpen);
  $("open-sidebar").setAttribute("aria-expanded", String(isOpen));
  $("scrim").hidden = !isOpen;
  if (isOpen) $("new").focus();
}

function showSettings(isOpen) {
  $("settings").hidden = !isOpen;
  $("open-settings").setAttribute("aria-expanded", String(isOpen));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("mmfree.theme", JSON.stringify(theme)); } catch { /* it lasts until the page is closed */ }
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = load("mmfree.theme", null) ?? (dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { if (!load("mmfree.theme", null)) document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; });

  const saved = load("mmfree.settings", {});
  for (const id of SETTINGS) {
    if (saved[id] !== undefined) $(id).value = saved[id];
    const show = () => { const output = document.querySelector(`output[for="${id}"]`); if (output) output.textContent = $(id).value; };
    $(id).addEventListener("input", () => {
      show();
      try { localStorage.setItem("mmfree.settings", JSON.stringify(Object.fromEntries(SETTINGS.map((name) => [name, $(name).value])))); } catch { /* they last until the page is closed */ }
    });
    show();
  }
  try { $("key").value = sessionStorage.getItem("mmfree.key") ?? ""; } catch { /* none */ }
  $("key").addEventListener("change", () => {
    try { sessionStorage.setItem("mmfree.key", $("key").value); } catch { /* it lasts until the page is closed */ }
    connect();
  });

  const stored = load(STORE, {});
  state.conversations = Array.isArray(stored.conversations) ? stored.conversations : [];
  state.current = state.conversations.find((c) => c.id === stored.current) ?? state.conversations[0] ?? newConversation("text");

  $("composer").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); write(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (state.running) stop();
    else { showSidebar(false); showSettings(false); }
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => select(newConversation(state.current.mode)));
  $("open-sidebar").addEventListener("click", () => showSidebar(true));
  $("close-sidebar").addEventListener("click", () => showSidebar(false));
  $("scrim").addEventListener("click", () => showSidebar(false));
  $("open-settings").addEventListener("click", () => showSettings($("settings").hidden));
  $("close-settings").addEventListener("click", () => { showSettings(false); $("open-settings").focus(); });
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  for (const radio of document.getElementsByName("mode")) {
    radio.addEventListener("change", () => { state.current.mode = radio.value; save(); render(); });
  }
  render();
  connect().then(render);
  if (matchMedia("(hover: hover)").matches) $("input").focus();
}

start();
