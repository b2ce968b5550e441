// The glass box shows how the model computed one token. Each view is built from the model's trace and cache.
//
// Texts of the model, of its tokens and of the user become text nodes, never HTML.

// make("p", {class: "hint"}, "text", node) returns an element with attributes and children.
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Calls point(index, isClick) for the child with data-index that the mouse is on.
function followMouse(node, point) {
  for (const kind of ["click", "mouseover"]) {
    node.addEventListener(kind, (event) => {
      const index = event.target.dataset?.index;
      if (index !== undefined) point(Number(index), kind === "click");
    });
  }
}

const VIEWS = ["attention", "distribution", "steps", "lens"];

class GlassBox {
  // page: {model, tokenizer, about, options()}. strip, panel: elements. chosen: function, called with a token's index.
  constructor(page, strip, panel, chosen) {
    this.page = page;
    this.strip = strip;
    this.panel = panel;
    this.chosen = chosen;
    this.sequence = []; // ids: prompt and answer, the newest token included
    this.drawn = new Map(); // index in the sequence -> {u}: the random number that chose the token
    this.selected = 0;
    this.view = VIEWS[0];
    this.layer = 0;
    this.head = -1; // -1: the mean of all heads
    this.stage = 0;
    this.opened = null; // the token whose score is shown as a sum
    this.pinned = false; // true after a click: the mouse then chooses no token until the next click
    strip.addEventListener("keydown", (event) => this.key(event));
    followMouse(strip, (index, isClick) => this.point(index, isClick));
  }

  // Called when the mouse is over a token, or a click was on it.
  point(index, isClick) {
    if (this.pinned && !isClick) return;
    this.pinned = isClick && !(this.pinned && index === this.selected);
    this.strip.classList.toggle("pinned", this.pinned);
    this.select(index);
  }

  show(id) {
    return this.page.tokenizer.show(id);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this.sequence.length) return;
    event.preventDefault();
    const last = this.sequence.length - 1;
    this.select(Math.max(0, Math.min(last, this.selected + steps[event.key])));
  }

  // Begin a new prompt.
  begin(ids) {
    this.sequence = [...ids];
    this.drawn.clear();
    this.pinned = false;
    this.strip.replaceChildren();
    ids.forEach((id, index) => this.append(id, index));
    this.selected = 0;
  }

  push(id, u) {
    this.sequence.push(id);
    this.drawn.set(this.sequence.length - 1, u);
    this.append(id, this.sequence.length - 1);
  }

  append(id, index) {
    const text = visible(this.show(id));
    const node = make("span", { role: "option", id: `token-${index}`, "data-index": index, "aria-selected": "false" }, text);
    node.className = this.page.about.eos.includes(id) ? "token end" : "token";
    this.strip.append(node);
  }

  select(index) {
    if (index === this.selected && this.panel.childElementCount) return;
    this.selected = index;
    this.draw();
    this.chosen(index);
  }

  setView(view) {
    this.view = view;
    this.draw();
  }

  // Draw the whole glass box again.
  draw() {
    const { panel, strip } = this;
    strip.querySelectorAll('[aria-selected="true"]').forEach((one) => one.setAttribute("aria-selected", "false"));
    const node = strip.children[this.selected];
    if (node) {
      node.setAttribute("aria-selected", "true");
      strip.setAttribute("aria-activedescendant", node.id);
      const { offsetTop, offsetHeight } = node;
      const top = offsetTop - strip.offsetTop;
      if (top < strip.scrollTop || top + offsetHeight > strip.scrollTop + strip.clientHeight) strip.scrollTop = top - 30;
    }
    this.heat(null);
    this.refresh = null; // function that draws again only what depends on the options
    const position = this.selected - 1;
    if (!this.sequence.length) return panel.replaceChildren(make("p", {}, say("empty")));
    if (position < 0 || position >= this.page.model.ids.length) {
      return panel.replaceChildren(make("p", {}, say("unseen")));
    }
    if (!this.page.model.trace[position]) return panel.replaceChildren(make("p", {}, say("dropped")));
    const id = this.sequence[this.selected];
    const probabilities = softmax(this.logits(position));
    const words = [this.selected + 1, this.sequence.length, visible(this.show(id)), id, percent(probabilities[id])];
    const active = document.activeElement;
    const focus = panel.contains(active) ? active.dataset.control : null; // a new node replaces the focused one
    panel.replaceChildren(make("p", { class: "which" }, say("position", ...words)), ...this[this.view](position, id));
    if (focus) panel.querySelector(`[data-control="${focus}"]`)?.focus();
    return undefined;
  }

  logits(position, stage = -1) {
    const { states } = this.page.model.trace[position];
    return Float32Array.from(this.page.model.project(states.at(stage)));
  }

  // Colour the tokens of the strip by weights, or not at all.
  heat(weights) {
    const highest = weights ? Math.max(1e-9, ...weights) : 1;
    Array.from(this.strip.children).forEach((node, index) => {
      const value = weights && index < weights.length ? weights[index] / highest : 0;
      node.style.setProperty("--heat", value.toFixed(3));
    });
  }

  // -- attention ----------------------------------------------------------------------------------------------

  attention(position, id) {
    const { model } = this.page;
    this.layer = Math.min(this.layer, model.attentions.length - 1);
    const heads = model.attentionOf(this.layer, position);
    this.head = Math.min(this.head, heads.length - 1);
    const mean = heads[0].map((_, column) => heads.reduce((sum, one) => sum + one[column], 0) / heads.length);
    this.heat(this.head < 0 ? mean : heads[this.head]);
    const choice = (name, options, value, set) =>
      make("label", {}, `${say(name)} `, select(name, options, value, (chosen) => { set(chosen); this.draw(); }));
    const layers = model.attentions.map((_, layer) => [layer, String(layer)]);
    const numbers = [[-1, say("mean")], ...heads.map((_, head) => [head, String(head)])];
    const rows = heads.map((weights, head) => {
      const top = mostLikely(weights, 3).map(([column, p]) => say("share", quoted(this.show(this.sequence[column])), percent(p)));
      const name = make("button", { type: "button", "data-control": `head-${head}`, "aria-pressed": String(head === this.head),
        onclick: () => { this.head = head === this.head ? -1 : head; this.draw(); } }, `${say("head")} ${head}`);
      return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, top.join("　")));
    });
    return [
      make("p", { class: "hint" }, say("attentionHint", visible(this.show(id)))),
      make("p", { class: "row" }, choice("layer", layers, this.layer, (value) => (this.layer = value)),
        choice("head", numbers, this.head, (value) => (this.head = value))),
      heatMap(heads, say("map", heads.length, this.layer, position + 1)),
      make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, say("head")),
        make("th", { scope: "col" }, say("headLooks")))), make("tbody", {}, ...rows)),
    ];
  }

  // -- distribution -------------------------------------------------------------------------------------------

  distribution(position, id) {
    const logits = this.logits(position);
    const box = make("div", {});
    this.refresh = () => box.replaceChildren(...this.bars(position, id, logits));
    this.refresh();
    const move = (name) => this.page.slider(name, `glass-${name}`); // a copy of the slider, easy to reach on a phone
    return [make("p", { class: "hint" }, say("distributionHint")), move("temperature"), move("top_p"), box];
  }

  bars(position, id, logits) {
    const raw = softmax(logits);
    const options = this.page.options();
    const ids = this.sequence.slice(0, position + 1);
    const after = softmax(filtered(penalized(logits, ids, options, this.page.about.tokens), options));
    const shown = mostLikely(raw, 10).map(([token]) => token);
    if (!shown.includes(id)) shown.push(id);
    const rows = shown.map((token) =>
      make("tr", token === id ? { class: "chosen" } : {},
        make("th", { scope: "row" }, quoted(this.show(token))), bar(raw[token]), bar(after[token])));
    const left = after.reduce((count, p) => count + (p > 0), 0);
    return [
      table([say("token"), say("raw"), say("after")], rows),
      make("p", {}, say("entropy", entropy(raw).toFixed(2), entropy(after).toFixed(2), left)),
    ];
  }

  // -- step by step -------------------------------------------------------------------------------------------

  steps(position, id) {
    const { model, about } = this.page;
    const { states } = model.trace[position];
    const last = states.length; // the stage after the last state shows logits and choice
    this.stage = Math.min(this.stage, last);
    const { stage } = this;
    const move = (key, by) => make("button", { type: "button", "data-control": key, disabled: stage + by < 0 || stage + by > last ? "" : null,
      onclick: () => { this.stage += by; this.draw(); } }, say(key));
    const parts = [make("p", { class: "row" }, move("stepBack", -1), move("stepOn", 1), make("span", {}, say("stage", stage + 1, last + 1)))];
    const kinds = stateKinds(model);
    if (stage === last) return [...parts, ...this.choiceStep(position, id)];
    const state = states[stage];
    const { kind, layer } = kinds[stage];
    if (kind === "embed") {
      const positions = about.operations[0].positions === null ? "" : say("withPosition");
      parts.push(make("h3", {}, say("stageEmbed", visible(this.show(this.sequence[position])))),
        make("p", {}, say("stageEmbedText", positions, state.length)));
    } else {
      const before = states[stage - 1];
      const change = lengthOf(state.map((value, i) => value - before[i])) / (lengthOf(before) || 1);
      const name = kind === "attention" ? "stageAttention" : "stageMlp";
      parts.push(make("h3", {}, say(name, layer)), make("p", {}, say(`${name}Text`, percent(change))));
    }
    if (kind === "attention") {
      const rows = model.attentionOf(layer, position).map((weights, head) => {
        const [[column, p]] = mostLikely(weights, 1);
        return make("tr", {}, make("th", { scope: "row" }, `${say("head")} ${head}`), make("td", {}, quoted(this.show(this.sequence[column]))), bar(p));
      });
      parts.push(table([say("head"), say("headLooks"), ""], rows));
    }
    parts.push(make("p", { class: "hint" }, `${say("stream", state.length)}; ${say("length", lengthOf(state).toFixed(2))}`), vectorMap(state));
    const likely = mostLikely(softmax(this.logits(position, stage)), 5);
    const rows = likely.map(([token, p]) => make("tr", token === id ? { class: "chosen" } : {}, make("th", { scope: "row" }, quoted(this.show(token))), bar(p)));
    parts.push(table([say("guess"), say("raw")], rows));
    return parts;
  }

  choiceStep(position, id) {
    const logits = this.logits(position);
    const raw = softmax(logits);
    const options = this.page.options();
    const ids = this.sequence.slice(0, position + 1);
    const after = softmax(filtered(penalized(logits, ids, options, this.page.about.tokens), options));
    const rows = mostLikely(raw, 8).map(([token]) => {
      const open = () => {
        this.opened = token === this.opened ? null : token;
        this.draw();
      };
      const about = { type: "button", "data-control": `logit-${token}`, "aria-expanded": String(token === this.opened), onclick: open };
      return make("tr", token === id ? { class: "chosen" } : {}, make("th", { scope: "row" }, quoted(this.show(token))),
        make("td", {}, make("button", about, logits[token].toFixed(2))), bar(raw[token]), bar(after[token]));
    });
    const u = this.drawn.get(this.selected);
    let how = say("chosenRead");
    if (u === null) how = say("chosenGreedy", visible(this.show(id)));
    else if (u !== undefined) how = say("chosenSample", u.toFixed(4), visible(this.show(id)));
    return [make("h3", {}, say("stageLogits")), make("p", {}, say("stageLogitsText")),
      table([say("token"), say("logit"), say("raw"), say("after")], rows), make("p", {}, how),
      ...(this.opened === null ? [make("p", { class: "hint" }, say("openLogit"))] : this.products(position, this.opened))];
  }

  // Show a score as the sum of its products; the largest products have their own rows.
  products(position, token) {
    const { model } = this.page;
    const score = this.logits(position)[token]; // this call also writes the norm's output to model.normed
    const { columns, weight } = model.head;
    const row = model.tensors[weight].subarray(token * columns, (token + 1) * columns);
    const found = Array.from(row, (value, channel) => [channel, model.normed[channel], value, model.normed[channel] * value]);
    const largest = found.sort((a, b) => Math.abs(b[3]) - Math.abs(a[3])).slice(0, 8);
    const rest = score - largest.reduce((sum, one) => sum + one[3], 0);
    const line = (title, ...numbers) => make("tr", {}, make("th", { scope: "row" }, title),
      ...numbers.map((number) => make("td", {}, number === null ? "" : number.toFixed(4))));
    return [make("p", { class: "hint" }, say("productsHint", visible(this.show(token)), columns)),
      table([say("channel"), say("normed"), say("weight"), say("product")], [
        ...largest.map(([channel, ...numbers]) => line(String(channel), ...numbers)),
        line(say("others", columns - largest.length), null, null, rest), line(say("sum"), null, null, score)], "products")];
  }

  // -- logit lens ---------------------------------------------------------------------------------------------

  lens(position, id) {
    const { model } = this.page;
    const rows = [];
    stateKinds(model).forEach(({ kind, layer }, stage) => {
      if (kind === "attention") return;
      const likely = mostLikely(softmax(this.logits(position, stage)), 4);
      const cells = likely.map(([token, p]) => {
        const cell = make("td", { class: token === id ? "chosen" : null }, quoted(this.show(token)), make("small", {}, ` ${percent(p)}`));
        cell.style.setProperty("--heat", p.toFixed(3));
        return cell;
      });
      const name = kind === "embed" ? say("embedding") : say("layerN", layer);
      rows.push(make("tr", {}, make("th", { scope: "row" }, name), ...cells));
    });
    return [make("p", { class: "hint" }, say("lensHint")), table([say("afterLayer"), "1", "2", "3", "4"], rows, "lens")];
  }
}

// Return for each state of the trace the part that wrote it: {kind: "embed" | "attention" | "mlp", layer}.
function stateKinds(model) {
  const found = [{ kind: "embed", layer: -1 }];
  let layer = -1;
  let sawAttention = false;
  for (const operation of model.body) {
    if (operation.kind === "attention") {
      layer = operation.layer;
      sawAttention = true;
    } else if (operation.add) {
      found.push({ kind: sawAttention ? "attention" : "mlp", layer });
      sawAttention = false;
    }
  }
  return found;
}

function lengthOf(vector) {
  return Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
}

function entropy(probabilities) {
  return probabilities.reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
}

// Replace white space and control characters by visible signs.
function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  return text.replace(/[ \n\t\r]/g, (one) => signs[one]).replace(/[\p{Cc}\p{Cf}]/gu, (one) => `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}

function quoted(text) {
  return `“${visible(text)}”`;
}

function table(titles, rows, kind = null) {
  const head = titles.map((title) => make("th", { scope: "col" }, title));
  return make("table", { class: kind }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function bar(p) {
  const fill = make("span", { class: "fill", "aria-hidden": "true" });
  fill.style.setProperty("--share", p.toFixed(4));
  return make("td", { class: "bar" }, fill, make("span", { class: "number" }, percent(p)));
}

function select(name, options, value, set) {
  const node = make("select", { "data-control": name, onchange: () => set(Number(node.value)) },
    ...options.map(([key, text]) => make("option", { value: key, selected: key === value ? "" : null }, text)));
  return node;
}

// Draw rows of numbers between 0 and 1. Each row is scaled to its highest number.
function heatMap(rows, label) {
  const canvas = make("canvas", { role: "img", "aria-label": label, width: rows[0].length, height: rows.length, class: "map" });
  const context = canvas.getContext("2d");
  rows.forEach((weights, y) => {
    const highest = Math.max(1e-9, ...weights);
    weights.forEach((weight, x) => {
      context.fillStyle = `rgba(29, 98, 196, ${weight / highest})`;
      context.fillRect(x, y, 1, 1);
    });
  });
  return canvas;
}

// Draw a vector: blue above 0, red below.
function vectorMap(vector) {
  const columns = Math.min(vector.length, 64);
  const label = say("stream", vector.length);
  const canvas = make("canvas", { role: "img", "aria-label": label, width: columns, height: Math.ceil(vector.length / columns), class: "map" });
  const context = canvas.getContext("2d");
  const highest = Math.max(1e-9, ...vector.map(Math.abs));
  vector.forEach((value, i) => {
    context.fillStyle = value > 0 ? `rgba(29, 98, 196, ${value / highest})` : `rgba(196, 43, 29, ${-value / highest})`;
    context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
  });
  return canvas;
}
