// The page: conversation, options, and the glass box, which shows how the model computed a token.

const SLIDERS = {
  // name: [from, to, step, default]
  temperature: [0.05, 2.5, 0.05, 1],
  top_k: [0, 100, 1, 0],
  top_p: [0.05, 1, 0.01, 1],
  min_p: [0, 1, 0.01, 0],
  repetition_penalty: [0.5, 2, 0.05, 1],
  max_new_tokens: [1, 1024, 1, 128],
  pace: [0, 2, 0.1, 0], // pause after each token in seconds, to watch the model write
};

class Page {
  constructor(about, tensors) {
    this.about = about;
    this.model = new Model(about, tensors);
    this.tokenizer = tokenizerOf(about.tokenizer);
    this.turns = [];
    this.shown = null;
    this.busy = false;
    this.stopped = false;
    this.said = ["ready"]; // the last status, to show it again in the other language
    this.at = (id) => document.getElementById(id);
    this.makeOptions();
    this.glass = new GlassBox(this, this.at("strip"), this.at("panel"), (index) => this.mark(index));
    this.makeTabs();
    this.at("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.at("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask();
    });
    this.at("stop").addEventListener("click", () => (this.stopped = true));
    this.at("clear").addEventListener("click", () => this.clear());
    this.at("language").addEventListener("click", () => this.speak(language === "en" ? "zh" : "en"));
    this.speak(language);
    this.at("optionBox").open = window.innerWidth > 832; // on a phone the answer comes first
    this.at("main").hidden = false;
    this.enable();
    if (about.opened) this.open(about.opened).catch((error) => this.status("failed", error.message));
  }

  // -- texts --------------------------------------------------------------------------------------------------

  speak(chosen) {
    speakPage(chosen);
    const { about } = this;
    this.at("name").textContent = about.name || "minigpt";
    this.at("facts").textContent = say("facts", about.parameters.toLocaleString("en"), about.dtype, about.context.toLocaleString("en"));
    this.at("alone").textContent = about.form === "question" || (about.form === "chat" && !about.chat.between) ? say("alone") : "";
    this.at("askLabel").textContent = say(about.form === "text" ? "askText" : "ask");
    for (const node of document.querySelectorAll("[data-who]")) node.textContent = say(node.dataset.who);
    this.status(...this.said);
    this.glass.draw();
  }

  status(...words) {
    this.said = words;
    this.at("status").textContent = say(...this.said);
  }

  note(text) {
    this.at("note").textContent = text;
  }

  // -- options ------------------------------------------------------------------------------------------------

  makeOptions() {
    const given = this.about.options;
    const most = { top_k: Math.min(200, this.about.tokens), max_new_tokens: Math.max(1, this.about.context - 1) };
    const draw = make("input", { type: "checkbox", id: "do_sample" });
    draw.checked = Boolean(given.do_sample);
    const list = this.at("sliders");
    list.append(make("p", {}, draw, " ", make("label", { for: "do_sample", "data-say": "do_sample" })));
    this.ranges = {};
    this.sliders = {}; // name -> all sliders of this option
    for (const [name, [from, to, step, usual]] of Object.entries(SLIDERS)) {
      const value = given[name] ?? usual;
      const limit = Math.max(Math.min(to, most[name] ?? to), value);
      this.ranges[name] = { min: Math.min(from, value), max: limit, step: step === 1 ? 1 : "any", value };
      list.append(this.slider(name, name));
    }
    const seed = make("input", { type: "number", id: "seed", min: 0, step: 1 });
    seed.value = String(given.seed ?? 0);
    list.append(make("p", { class: "slider" }, make("label", { for: "seed", "data-say": "seed" }), seed));
    draw.addEventListener("change", () => this.optionMoved());
    if (this.about.chat?.tails.off) {
      const think = make("input", { type: "checkbox", id: "thinking" });
      think.checked = true;
      list.append(make("p", {}, think, " ", make("label", { for: "thinking", "data-say": "thinking" })));
    }
  }

  // Make a slider for an option. All sliders of one option move together.
  slider(name, id) {
    const { min, max, step, value } = this.ranges[name];
    const node = make("input", { type: "range", id, min, max, step, "data-control": id });
    const number = make("output", { for: id });
    const set = (chosen) => {
      node.value = chosen;
      number.textContent = step === 1 ? node.value : Number(node.value).toFixed(2);
    };
    set(this.sliders[name]?.[0].node.value ?? value);
    this.sliders[name] = [...(this.sliders[name] ?? []).filter((one) => one.node.isConnected || one.node.id === name), { node, set }];
    node.addEventListener("input", () => {
      this.sliders[name].forEach((one) => one.set(node.value));
      this.optionMoved();
    });
    return make("p", { class: "slider" }, make("label", { for: id, "data-say": name }, say(name)), node, number);
  }

  optionMoved() {
    if (this.busy) return;
    if (this.glass.refresh) this.glass.refresh();
    else if (this.glass.view === "steps") this.glass.draw();
  }

  options() {
    const found = { do_sample: this.at("do_sample").checked };
    for (const name of Object.keys(SLIDERS)) found[name] = Number(this.at(name).value);
    found.seed = Math.max(0, Math.floor(Number(this.at("seed").value) || 0));
    return found;
  }

  // -- the conversation ---------------------------------------------------------------------------------------

  async ask() {
    const text = this.at("question").value;
    if (this.busy || (!text.trim() && this.about.form !== "text")) return;
    const { about, model, tokenizer } = this;
    const options = this.options();
    const room = about.context - Math.max(1, Math.min(options.max_new_tokens, Math.floor(about.context / 4)));
    const thinking = this.at("thinking")?.checked ?? true;
    const { ids, left } = promptOf(about, tokenizer, this.turns, text, room, thinking);
    if (ids.length > about.context - 1) return this.status("tooLong", ids.length, about.context);
    if (!ids.length) return;
    const unknown = tokenizer.unknownCharacters(text);
    const notes = unknown.length ? [say("unknown", unknown.slice(0, 20).join(" "))] : [];
    if (left && about.chat?.between) notes.push(say("forgot", left));
    this.note(notes.join(" "));
    this.at("question").value = "";
    const turn = { said: text, prompt: ids, ids: [], drawn: [], answer: "" };
    this.turns.push(turn);
    this.shown = turn;
    this.show(turn);
    this.glass.begin(ids);
    this.busy = true;
    this.stopped = false;
    this.enable();
    try {
      await this.write(turn, options);
    } catch (error) {
      this.status("failed", error.message);
    }
    this.busy = false;
    this.enable();
  }

  // Show what `minigpt look --output` has put into the page: a question and its answer, or a text (no answer).
  async open({ said, prompt, ids, isOwn, view, layer, head }) {
    const turn = { said, prompt, ids: [], drawn: [], answer: "" };
    if (ids.length) this.turns.push(turn);
    this.shown = turn;
    this.busy = true;
    this.enable();
    const all = [...prompt, ...ids];
    let rested = performance.now();
    for (let i = 0; i < all.length - 1; i++) {
      this.model.step(all[i], false);
      if (performance.now() - rested < 30) continue;
      this.status("read", i + 1, all.length);
      await new Promise((resolve) => setTimeout(resolve, 0));
      rested = performance.now();
    }
    this.show(turn, ids.length > 0);
    this.glass.begin(prompt);
    for (const id of ids) this.receive(turn, id, isOwn ? null : undefined);
    this.fillSpans(turn, true);
    Object.assign(this.glass, { layer, head });
    this.openTab(view, false);
    this.glass.select(ids.length ? prompt.length : prompt.length - 1);
    const unknown = this.tokenizer.unknownCharacters(said);
    if (unknown.length) this.note(say("unknown", unknown.slice(0, 20).join(" ")));
    this.busy = false;
    this.status("ready");
    this.enable();
  }

  async write(turn, options) {
    const numbers = new RandomNumbers(options.seed);
    const began = performance.now();
    let rested = began;
    let first = began;
    for (const one of answerOf(this.model, this.about, turn.prompt, options, () => numbers.next())) {
      if (one.read !== undefined) this.status("read", one.read, one.of);
      else {
        if (!turn.ids.length) first = performance.now();
        this.receive(turn, one.id, one.u);
      }
      const pause = one.id !== undefined ? 1000 * Number(this.at("pace").value) : 0;
      if (!pause && performance.now() - rested < 30) continue;
      if (turn.ids.length) {
        this.status("writing", turn.ids.length);
        if (pause || this.quick()) this.glass.select(this.glass.sequence.length - 1);
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
      rested = performance.now();
      if (this.stopped) break;
    }
    this.fillSpans(turn, true);
    const seconds = (performance.now() - first) / 1000;
    const count = turn.ids.length;
    this.speed = seconds > 0 ? (count - 1) / seconds : 0;
    this.status("done", count, ((performance.now() - began) / 1000).toFixed(2), this.speed.toFixed(1));
    const ended = this.about.eos.includes(turn.ids[count - 1]);
    if (!ended && turn.prompt.length + count >= this.about.context) this.note(`${this.at("note").textContent} ${say("full", this.about.context)}`);
    this.glass.select(turn.prompt.length); // the first token of the answer
    this.glass.draw();
  }

  // While the model writes, the glass box follows only if drawing costs little.
  quick() {
    const { head } = this.model;
    const draws = this.glass.view === "lens" ? this.model.attentions.length + 2 : 3;
    return head.rows * head.columns * draws < 2e7;
  }

  receive(turn, id, u) {
    turn.ids.push(id);
    turn.drawn.push(u);
    this.glass.push(id, u);
    const written = this.about.eos.includes(id) ? turn.ids.slice(0, -1) : turn.ids;
    turn.answer = this.tokenizer.decode(written);
    const index = turn.prompt.length + turn.ids.length - 1;
    const ended = this.about.eos.includes(id);
    const node = make("span", { class: ended ? "said end" : "said", "data-index": index }, ended ? "∎" : "");
    turn.body.append(node);
    turn.spans.push(node);
    this.fillSpans(turn, false);
  }

  // A character may consist of several tokens. The span of the last token shows it.
  fillSpans(turn, isLast) {
    const { answer, filled } = turn;
    if (!turn.spans.length || (answer.endsWith("\ufffd") && !isLast)) return;
    const written = this.about.eos.includes(turn.ids.at(-1)) ? turn.ids.length - 1 : turn.ids.length;
    if (!written || answer === filled) return;
    if (answer.startsWith(filled)) turn.spans[written - 1].textContent += answer.slice(filled.length);
    else turn.spans.forEach((span, i) => i < written && (span.textContent = i === written - 1 ? answer : ""));
    turn.filled = answer;
  }

  show(turn, hasAnswer = true) {
    const log = this.at("log");
    turn.body = make("div", { class: "body" });
    turn.spans = [];
    turn.filled = "";
    followMouse(turn.body, (index, isClick) => this.look(turn, index, isClick));
    log.append(make("div", { class: "turn you" }, make("span", { class: "who", "data-who": "you" }, say("you")), make("div", { class: "body" }, turn.said)));
    if (hasAnswer) log.append(make("div", { class: "turn model" }, make("span", { class: "who", "data-who": "model" }, say("model")), turn.body));
    log.scrollTop = log.scrollHeight;
  }

  // Show a token of any turn in the glass box. For an earlier turn, the model reads the tokens again.
  look(turn, index, isClick) {
    if (this.busy || (this.glass.pinned && !isClick)) return;
    const all = [...turn.prompt, ...turn.ids];
    const same = this.glass.sequence.length === all.length && all.every((id, i) => this.glass.sequence[i] === id);
    if (!same) {
      for (let i = this.model.reuse(all); i < all.length - 1; i++) this.model.step(all[i], false);
      this.glass.begin(turn.prompt);
      turn.ids.forEach((id, i) => this.glass.push(id, turn.drawn[i]));
    }
    this.shown = turn;
    this.glass.point(index, isClick);
  }

  mark(index) {
    for (const node of document.querySelectorAll(".said.marked")) node.classList.remove("marked");
    const turn = this.shown; // the turn whose tokens the glass box shows
    turn?.spans[index - turn.prompt.length]?.classList.add("marked");
  }

  clear() {
    if (this.busy) return;
    this.turns = [];
    this.shown = null;
    this.at("log").replaceChildren();
    this.note("");
    this.glass.begin([]);
    this.glass.draw();
    this.at("question").focus();
  }

  enable() {
    this.at("send").disabled = this.busy;
    this.at("clear").disabled = this.busy;
    this.at("stop").disabled = !this.busy;
    this.at("log").setAttribute("aria-busy", String(this.busy));
  }

  // -- tabs ---------------------------------------------------------------------------------------------------

  makeTabs() {
    const list = this.at("tabs");
    const open = (this.openTab = (view, focus) => {
      for (const tab of list.children) {
        const chosen = tab.dataset.view === view;
        tab.setAttribute("aria-selected", String(chosen));
        tab.tabIndex = chosen ? 0 : -1;
        if (chosen && focus) tab.focus();
      }
      this.at("panel").setAttribute("aria-labelledby", `tab-${view}`);
      this.glass.setView(view);
    });
    for (const view of VIEWS) {
      list.append(make("button", { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": "panel", "data-view": view, "data-say": view, onclick: () => open(view, false) }));
    }
    list.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      open(VIEWS[(VIEWS.indexOf(this.glass.view) + by + VIEWS.length) % VIEWS.length], true);
    });
    open(VIEWS[0], false);
  }
}

function speakPage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
}

// Yield the texts of the elements that hold the model. The elements are removed, to free their memory.
function* takeParts(kind) {
  for (const node of document.querySelectorAll(`script.${kind}`)) {
    const text = node.textContent;
    node.remove();
    yield text;
  }
}

async function startPage() {
  const asked = navigator.languages?.[0] ?? navigator.language ?? "en";
  speakPage(asked.startsWith("zh") ? "zh" : "en");
  const status = document.getElementById("status");
  if (typeof DecompressionStream === "undefined") {
    status.textContent = say("noDecompression");
    return;
  }
  status.textContent = say("loading");
  let read = null;
  try {
    const size = Number(document.documentElement.dataset.size);
    read = await readModel(takeParts("description"), size, takeParts("weights"));
  } catch (error) {
    status.textContent = say(error instanceof RangeError ? "noMemory" : "damaged", error.message);
    return;
  }
  try {
    globalThis.minigptPage = new Page(read.about, read.tensors);
  } catch (error) {
    status.textContent = say("failed", error.message); // the browser may be too old for the program
    throw error;
  }
}

if (typeof document !== "undefined") startPage();
