// Chooses the next token. Names, order and effect of the options are as in minigpt's Python code.

// Return a copy of the scores after penalties. Ids from `tokens` on have no token, so they are never chosen.
function penalized(logits, ids, options, tokens) {
  const scores = Float32Array.from(logits);
  scores.fill(-Infinity, tokens);
  const penalty = options.repetition_penalty;
  if (penalty !== 1) {
    for (const id of new Set(ids)) scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
  }
  return scores;
}

// Return a copy of the scores after temperature, top_k, top_p and min_p, in this order. Excluded tokens get -Infinity.
function filtered(logits, options) {
  const scores = Float32Array.from(logits, (score) => score / options.temperature);
  if (options.top_k > 0 && options.top_k < scores.length) {
    const lowest = Float32Array.from(scores).sort()[scores.length - options.top_k];
    for (let i = 0; i < scores.length; i++) if (scores[i] < lowest) scores[i] = -Infinity;
  }
  if (options.top_p < 1) {
    const order = ascending(scores);
    const probabilities = softmax(scores);
    let sum = 0;
    for (let i = 0; i < order.length - 1; i++) {
      sum += probabilities[order[i]];
      if (Math.fround(sum) > Math.fround(1 - options.top_p)) break;
      scores[order[i]] = -Infinity;
    }
  }
  if (options.min_p > 0) {
    const probabilities = softmax(scores);
    const least = Math.fround(options.min_p * Math.fround(highestOf(probabilities)));
    for (let i = 0; i < scores.length; i++) if (Math.fround(probabilities[i]) < least) scores[i] = -Infinity;
  }
  return scores;
}

function highestOf(numbers) {
  let highest = -Infinity;
  for (const number of numbers) if (number > highest) highest = number;
  return highest;
}

function ascending(scores) {
  const order = new Uint32Array(scores.length);
  for (let i = 0; i < order.length; i++) order[i] = i;
  return order.sort((a, b) => scores[a] - scores[b] || (scores[a] === scores[b] ? a - b : 0));
}

function softmax(scores) {
  const highest = highestOf(scores);
  const out = new Float64Array(scores.length);
  let sum = 0;
  for (let i = 0; i < out.length; i++) {
    out[i] = Math.exp(scores[i] - highest);
    sum += out[i];
  }
  for (let i = 0; i < out.length; i++) out[i] /= sum;
  return out;
}

// Return the most likely token, the first of several.
function greedy(scores) {
  let best = 0;
  for (let i = 1; i < scores.length; i++) if (scores[i] > scores[best]) best = i;
  return best;
}

// Return the first token at which the cumulative distribution exceeds u, a number 0 <= u < 1.
function sample(scores, u) {
  const probabilities = softmax(scores);
  let last = 0;
  for (const one of probabilities) last += one;
  let sum = 0;
  for (let i = 0; i < probabilities.length; i++) {
    sum += probabilities[i];
    if (sum / last > u) return i;
  }
  return greedy(scores);
}

// Choose a token from the model's logits. The random number `u` is used only if options.do_sample is on.
function choose(logits, ids, options, tokens, u) {
  const scores = penalized(logits, ids, options, tokens);
  return options.do_sample ? sample(filtered(scores, options), u) : greedy(scores);
}

// Return the k most likely tokens, [[id, probability], ...], in descending order.
function mostLikely(probabilities, k) {
  const found = [];
  for (let id = 0; id < probabilities.length; id++) {
    const p = probabilities[id];
    if (found.length === k && p <= found[k - 1][1]) continue;
    let place = found.length;
    while (place > 0 && found[place - 1][1] < p) place--;
    found.splice(place, 0, [id, p]);
    if (found.length > k) found.pop();
  }
  return found;
}

// Random numbers 0 <= u < 1, equal to those of NumPy's default_rng([seed, 0]), so that a seed gives the same answer
// here and in `minigpt generate --do_sample --seed`. The generator is PCG64, https://www.pcg-random.org.
class RandomNumbers {
  constructor(seed) {
    const words = seedWords([...wordsOf(seed), 0], 8);
    const wide = (at) => (BigInt(words[at + 1]) << 32n) | BigInt(words[at]);
    this.increment = BigInt.asUintN(128, (((wide(4) << 64n) | wide(6)) << 1n) | 1n);
    this.state = 0n;
    this.advance();
    this.state += (wide(0) << 64n) | wide(2);
    this.advance();
  }

  advance() {
    this.state = BigInt.asUintN(128, this.state * 0x2360ed051fc65da44385df649fccf645n + this.increment);
  }

  next() {
    this.advance();
    const high = this.state >> 64n;
    const mixed = high ^ BigInt.asUintN(64, this.state);
    const turn = high >> 58n;
    const bits = BigInt.asUintN(64, (mixed >> turn) | (mixed << ((64n - turn) & 63n)));
    return Number(bits >> 11n) / 2 ** 53;
  }
}

function wordsOf(seed) {
  const words = [];
  for (let rest = BigInt(seed); rest > 0n; rest >>= 32n) words.push(Number(rest & 0xffffffffn));
  return words.length ? words : [0];
}

// NumPy's SeedSequence: mixes the words of a seed into `count` words of 32 bits.
function seedWords(entropy, count) {
  const stirred = (value) => (value ^ (value >>> 16)) >>> 0;
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    return stirred(Math.imul(value, constant));
  };
  const mix = (a, b) => stirred(Math.imul(a, 0xca01f9dd) - Math.imul(b, 0x4973f715));
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const word of entropy.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(word));
  constant = 0x8b51f9dd;
  const out = [];
  for (let i = 0; i < count; i++) {
    const value = (pool[i % 4] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    out.push(stirred(Math.imul(value, constant)));
  }
  return out;
}
