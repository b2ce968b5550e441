// The model: one token at a time, with a cache of keys and values.
//
// `about.operations` lists what is computed, in order. There are three kinds:
//   embed      x = table[id], plus the vector of the position, if positions are learned
//   product    out = activation(weight * norm(input) + bias); `add`: out += activation(...). Matrices are (out, in)
//   attention  out = each head's weighted mean of values; queries, keys and values stand side by side in input
// After each operation that writes to the residual stream x, the trace keeps a copy of x for the glass box (views.js).

const NORMS = { layer: layerNorm, rms: rmsNorm };
const TRACE_FLOATS = 2 ** 25; // largest number of floats in the trace: 128 MiB

class Model {
  constructor(about, tensors) {
    this.about = about;
    this.tensors = tensors;
    this.context = about.context;
    this.buffers = {};
    for (const [name, width] of Object.entries(about.buffers)) this.buffers[name] = new Float32Array(width);
    this.body = about.operations.slice(0, -1);
    this.head = about.operations[about.operations.length - 1];
    this.attentions = this.body.filter((operation) => operation.kind === "attention");
    this.attentions.forEach((operation, layer) => (operation.layer = layer));
    const widest = Math.max(...Object.values(about.buffers));
    this.normed = new Float32Array(widest);
    this.wide = new Float32Array(widest);
    this.scores = new Float32Array(about.context);
    this.caches = this.attentions.map(() => ({ keys: new Float32Array(0), values: new Float32Array(0) }));
    const states = 1 + this.body.filter((operation) => operation.add).length;
    const queries = this.attentions.reduce((sum, one) => sum + one.heads * one.headDim, 0);
    this.traced = Math.max(64, Math.floor(TRACE_FLOATS / (states * about.buffers.x + queries)));
    this.ids = []; // the tokens in the cache
    this.trace = []; // {states, queries} for each cached token; the oldest may be dropped
  }

  // Forget the tokens from `length` on.
  truncate(length) {
    this.ids.length = this.trace.length = Math.min(length, this.ids.length);
  }

  // Keep the cached tokens that new ids begin with, but read the last id again. Returns the number of kept tokens.
  reuse(ids) {
    let known = 0;
    while (known < ids.length - 1 && this.ids[known] === ids[known]) known++;
    this.truncate(known);
    return known;
  }

  // Read one token. Returns the logits of the next token, or null if the caller does not want logits.
  step(id, wanted = true) {
    const position = this.ids.length;
    if (position >= this.context) throw new RangeError("the context is full");
    const trace = { states: [], queries: [] };
    for (const operation of this.body) {
      if (operation.kind === "embed") this.embed(operation, id, position);
      else if (operation.kind === "product") this.product(operation, this.buffers[operation.input]);
      else this.attention(operation, position, trace);
      if (operation.kind === "embed" || operation.add) trace.states.push(this.buffers.x.slice());
    }
    this.ids.push(id);
    this.trace.push(trace);
    if (this.trace.length > this.traced) this.trace[this.trace.length - 1 - this.traced] = undefined;
    return wanted ? this.project(this.buffers.x) : null;
  }

  // Apply the last norm and the output matrix to any vector of the residual stream (logit lens).
  project(state) {
    this.product(this.head, state);
    return this.buffers[this.head.output];
  }

  embed(operation, id, position) {
    const x = this.buffers.x;
    const C = x.length;
    const table = this.tensors[operation.weight];
    for (let i = 0; i < C; i++) x[i] = table[id * C + i];
    if (operation.positions === null) return;
    const positions = this.tensors[operation.positions];
    for (let i = 0; i < C; i++) x[i] += positions[position * C + i];
  }

  product(operation, source) {
    const { rows, columns, inputAt, outputAt, norm } = operation;
    let input = inputAt ? source.subarray(inputAt) : source;
    if (norm) {
      const bias = norm.bias === null ? null : this.tensors[norm.bias];
      NORMS[norm.kind](input, this.tensors[norm.weight], bias, norm.eps, this.normed, columns);
      input = this.normed;
    }
    const bias = operation.bias === null ? null : this.tensors[operation.bias];
    const out = this.buffers[operation.output];
    multiply(this.tensors[operation.weight], bias, input, rows, columns, out, outputAt, operation.add);
    if (operation.activation === "swiglu") {
      multiply(this.tensors[operation.values], null, input, rows, columns, this.wide, 0, false);
      for (let i = 0; i < rows; i++) {
        const gate = out[outputAt + i];
        out[outputAt + i] = (gate / (1 + Math.exp(-gate))) * this.wide[i];
      }
    } else if (operation.activation) {
      const gelu = operation.activation === "gelu_tanh" ? geluTanh : geluExact;
      for (let i = outputAt; i < outputAt + rows; i++) out[i] = gelu(out[i]);
    }
  }

  attention(operation, position, trace) {
    const { heads, kvHeads, headDim, layer } = operation;
    const input = this.buffers[operation.input];
    const out = this.buffers[operation.output];
    const queries = heads * headDim;
    const width = kvHeads * headDim;
    for (const [norm, start, count] of [
      [operation.queryNorm, 0, heads],
      [operation.keyNorm, queries, kvHeads],
    ]) {
      for (let head = 0; head < count; head++) {
        const vector = input.subarray(start + head * headDim, start + (head + 1) * headDim);
        if (norm !== null) rmsNorm(vector, this.tensors[norm], null, operation.eps, vector, headDim);
        if (this.about.rotary) rotate(vector, position, this.about.rotary);
      }
    }
    const cache = this.caches[layer];
    if (cache.keys.length < (position + 1) * width) {
      const length = Math.min(Math.max(64, 2 * (position + 1)), this.context) * width;
      for (const name of ["keys", "values"]) {
        const longer = new Float32Array(length);
        longer.set(cache[name]);
        cache[name] = longer;
      }
    }
    cache.keys.set(input.subarray(queries, queries + width), position * width);
    cache.values.set(input.subarray(queries + width, queries + 2 * width), position * width);
    trace.queries.push(input.slice(0, queries));
    for (let head = 0; head < heads; head++) {
      const first = this.weigh(operation, input, head, position);
      const kvHead = Math.floor((head * kvHeads) / heads);
      for (let i = 0; i < headDim; i++) {
        let sum = 0;
        let at = first * width + kvHead * headDim + i;
        for (let column = first; column <= position; column++, at += width) {
          sum += this.scores[column] * cache.values[at];
        }
        out[head * headDim + i] = sum;
      }
    }
  }

  // Write the attention weights of one head to `scores`. Returns the first token that the head can see.
  weigh(operation, queries, head, position) {
    const { heads, kvHeads, headDim, window, layer } = operation;
    const width = kvHeads * headDim;
    const keys = this.caches[layer].keys;
    const scores = this.scores;
    const kvHead = Math.floor((head * kvHeads) / heads);
    const first = window === null ? 0 : Math.max(0, position - window + 1);
    const scale = 1 / Math.sqrt(headDim);
    let highest = -Infinity;
    for (let column = first; column <= position; column++) {
      let sum = 0;
      const q = head * headDim;
      const k = column * width + kvHead * headDim;
      for (let i = 0; i < headDim; i++) sum += queries[q + i] * keys[k + i];
      scores[column] = sum * scale;
      if (scores[column] > highest) highest = scores[column];
    }
    let total = 0;
    for (let column = first; column <= position; column++) {
      scores[column] = Math.exp(scores[column] - highest);
      total += scores[column];
    }
    for (let column = first; column <= position; column++) scores[column] /= total;
    return first;
  }

  // Return for each head of a layer the weights with which the token at a position attends to tokens 0 .. position.
  attentionOf(layer, position) {
    const operation = this.attentions[layer];
    const queries = this.trace[position].queries[layer];
    const found = [];
    for (let head = 0; head < operation.heads; head++) {
      const weights = new Float32Array(position + 1);
      const first = this.weigh(operation, queries, head, position);
      for (let column = first; column <= position; column++) weights[column] = this.scores[column];
      found.push(weights);
    }
    return found;
  }
}

// out = weight * x + bias. Four rows are computed at a time, so that each number of x is read once for four products.
function multiply(weight, bias, x, rows, columns, out, outAt, add) {
  let row = 0;
  for (; row + 3 < rows; row += 4) {
    const a = row * columns;
    const b = a + columns;
    const c = b + columns;
    const d = c + columns;
    let first = 0;
    let second = 0;
    let third = 0;
    let fourth = 0;
    for (let i = 0; i < columns; i++) {
      const value = x[i];
      first += weight[a + i] * value;
      second += weight[b + i] * value;
      third += weight[c + i] * value;
      fourth += weight[d + i] * value;
    }
    const at = outAt + row;
    store(out, at, first, bias, row, add);
    store(out, at + 1, second, bias, row + 1, add);
    store(out, at + 2, third, bias, row + 2, add);
    store(out, at + 3, fourth, bias, row + 3, add);
  }
  for (; row < rows; row++) {
    let sum = 0;
    for (let i = 0; i < columns; i++) sum += weight[row * columns + i] * x[i];
    store(out, outAt + row, sum, bias, row, add);
  }
}

function store(out, at, sum, bias, row, add) {
  if (bias !== null) sum += bias[row];
  out[at] = add ? out[at] + sum : sum;
}

function layerNorm(x, weight, bias, eps, out, count) {
  let mean = 0;
  for (let i = 0; i < count; i++) mean += x[i];
  mean /= count;
  let variance = 0;
  for (let i = 0; i < count; i++) variance += (x[i] - mean) ** 2;
  const scale = 1 / Math.sqrt(variance / count + eps);
  for (let i = 0; i < count; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

function rmsNorm(x, weight, bias, eps, out, count) {
  let squares = 0;
  for (let i = 0; i < count; i++) squares += x[i] * x[i];
  const scale = 1 / Math.sqrt(squares / count + eps);
  for (let i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

// RoPE: channel i and channel i + D/2 are rotated by position * frequency[i].
function rotate(vector, position, rotary) {
  const half = rotary.frequencies.length;
  for (let i = 0; i < half; i++) {
    const angle = Math.fround(position * rotary.frequencies[i]); // in float32, as in training
    const cos = Math.cos(angle) * rotary.factor;
    const sin = Math.sin(angle) * rotary.factor;
    const first = vector[i];
    const second = vector[i + half];
    vector[i] = first * cos - second * sin;
    vector[i + half] = second * cos + first * sin;
  }
}

function geluTanh(x) {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

function geluExact(x) {
  return 0.5 * x * (1 + erf(x / Math.SQRT2));
}

// Return the error function of x by Abramowitz and Stegun, formula 7.1.26. The error is below 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const value = 1 - sum * Math.exp(-x * x);
  return x < 0 ? -value : value;
}
