// Converts text to ids and back, with minigpt's tokenizers: single characters, byte-level BPE, and WordPiece.
//
// The name of a special token in a text never becomes this token, because text from a user must stay text.

function tokenizerOf(about) {
  const kinds = { characters: Characters, bpe: BytePairs, wordpiece: WordPieces };
  return new kinds[about.kind](about);
}

class Characters {
  constructor(about) {
    this.words = about.words;
    this.unknown = about.unknown;
    this.special = new Set(about.special);
    this.padding = about.padding;
    this.ids = new Map();
    this.words.forEach((word, id) => this.special.has(id) || this.ids.set(word, id));
  }

  encode(text) {
    return Array.from(text, (character) => this.ids.get(character) ?? this.unknown);
  }

  decode(ids) {
    return ids.map((id) => (id === this.padding ? "" : this.words[id])).join("");
  }

  unknownCharacters(text) {
    return [...new Set(Array.from(text).filter((character) => !this.ids.has(character)))];
  }

  // Return a token's text to show.
  show(id) {
    return this.words[id] ?? `<${id}>`;
  }

  around(ids) {
    return ids;
  }
}

class BytePairs {
  constructor(about) {
    this.about = about;
    this.pattern = new RegExp(about.pattern, "gu");
    this.words = new Map(Object.entries(about.words));
    const texts = [...this.words.keys()].sort((a, b) => b.length - a.length);
    const escaped = texts.map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.word = escaped.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    this.symbols = byteSymbols();
    this.byteOf = new Map(this.symbols.map((symbol, byte) => [symbol, byte]));
    this.special = new Map(about.special.map(([text, id]) => [id, text]));
    this.wordOf = new Map([...this.words].map(([text, id]) => [id, text]));
    this.ids = new Map();
    about.tokens.forEach((token, id) => token !== null && !this.special.has(id) && this.ids.set(token, id));
    this.merges = new Map();
    for (let i = 0; i < about.merges.length; i += 3) {
      const [left, right, made] = about.merges.slice(i, i + 3);
      this.merges.set(left * 2 ** 21 + right, [i, made]);
    }
    this.known = new Map();
  }

  encode(text) {
    text = text.replace(/\p{Cs}/gu, "\ufffd"); // half a character (a lone surrogate) has no bytes
    const ids = [];
    for (const piece of this.word ? text.split(this.word) : [text]) {
      if (this.words.has(piece)) ids.push(this.words.get(piece));
      else if (piece) this.encodePiece(piece, ids);
    }
    return ids;
  }

  encodePiece(text, ids) {
    if (this.about.nfc) text = text.normalize("NFC");
    if (this.about.prefixSpace && !text.startsWith(" ")) text = ` ${text}`;
    for (const [word] of text.matchAll(this.pattern)) {
      let found = this.known.get(word);
      if (!found) {
        found = this.merge(word);
        if (this.known.size < 10000) this.known.set(word, found);
      }
      for (const id of found) ids.push(id);
    }
  }

  // Merge the pair that was learned first, until no pair is known.
  merge(word) {
    const symbols = Array.from(new TextEncoder().encode(word), (byte) => this.symbols[byte]);
    if (this.about.ignoreMerges && this.ids.has(symbols.join(""))) return [this.ids.get(symbols.join(""))];
    const ids = symbols.map((symbol) => this.ids.get(symbol));
    for (;;) {
      let best = null;
      let place = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const pair = this.merges.get(ids[i] * 2 ** 21 + ids[i + 1]);
        if (pair && (best === null || pair[0] < best[0])) {
          best = pair;
          place = i;
        }
      }
      if (best === null) return ids;
      ids.splice(place, 2, best[1]);
    }
  }

  bytes(id) {
    const text = this.special.get(id) ?? this.wordOf.get(id);
    if (text !== undefined) return new TextEncoder().encode(text);
    const token = this.about.tokens[id] ?? "";
    const found = Array.from(token, (symbol) => this.byteOf.get(symbol));
    return found.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(found);
  }

  decode(ids) {
    const bytes = ids.flatMap((id) => Array.from(this.bytes(id)));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }

  unknownCharacters() {
    return [];
  }

  show(id) {
    const bytes = this.bytes(id);
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch {
      return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
    }
  }

  around(ids) {
    return [...this.about.before, ...ids, ...this.about.after];
  }
}

// Return byte -> the printable character that stands for it in the files of a byte-level vocabulary.
function byteSymbols() {
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte >= 33 && byte < 127) || (byte >= 161 && byte < 173) || byte >= 174;
    return String.fromCodePoint(printable ? byte : others++);
  });
}

// BERT's tokenizer, which most Chinese GPT-2 models have. White space is lost.
class WordPieces {
  constructor(about) {
    this.about = about;
    this.tokens = about.tokens;
    this.special = new Set(about.special);
    this.ids = new Map();
    about.tokens.forEach((token, id) => token !== null && !this.special.has(id) && this.ids.set(token, id));
  }

  encode(text) {
    return this.wordsOf(text).flatMap((word) => this.cut(word));
  }

  // Clean the text, remove accents, convert to lower case. A Chinese character or punctuation mark is a word.
  wordsOf(text) {
    const { cleans, separatesChinese, stripsAccents, lowers } = this.about;
    if (cleans) {
      text = text.replace(/(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\p{Cs}\ufffd]/gu, "").replace(WHITE, " ");
    }
    if (separatesChinese) text = text.replace(CHINESE, " $& ");
    if (stripsAccents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    if (lowers) text = Array.from(text, (character) => character.toLowerCase()).join("");
    return text.replace(PUNCTUATION, " $& ").split(WHITE).filter(Boolean);
  }

  // Cut a word into the longest pieces that the vocabulary has, from left to right.
  cut(word) {
    const characters = Array.from(word);
    if (characters.length > this.about.longest) return [this.about.unknown];
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length;
      const piece = () => (start ? "##" : "") + characters.slice(start, end).join("");
      while (end > start && !this.ids.has(piece())) end--;
      if (end === start) return [this.about.unknown];
      ids.push(this.ids.get(piece()));
      start = end;
    }
    return ids;
  }

  decode(ids) {
    const known = ids.filter((id) => this.tokens[id] != null);
    const pieces = known.map((id, place) => {
      const token = this.tokens[id];
      if (!place) return this.joined(token);
      return this.joined(token.startsWith("##") ? token.slice(2) : ` ${token}`);
    });
    const text = pieces.join("");
    return this.about.cleansText ? replaced(text, JOINED.filter(([spaced]) => spaced !== " do not")) : text;
  }

  joined(token) {
    return this.about.cleansTokens ? replaced(token, JOINED) : token;
  }

  unknownCharacters(text) {
    const unknown = this.wordsOf(text).filter((word) => this.cut(word)[0] === this.about.unknown);
    return [...new Set(unknown)];
  }

  show(id) {
    return this.tokens[id] ?? `<${id}>`;
  }

  around(ids) {
    return [...this.about.before, ...ids, ...this.about.after];
  }
}

const WHITE = /[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/gu;
const CHINESE = new RegExp(
  "[\\u4e00-\\u9fff\\u3400-\\u4dbf\\u{20000}-\\u{2a6df}\\u{2a700}-\\u{2b73f}\\u{2b740}-\\u{2b81f}" +
    "\\u{2b920}-\\u{2ceaf}\\uf900-\\ufaff\\u{2f800}-\\u{2fa1f}]",
  "gu",
);
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/gu;
// Replacements of decoding, in this order: English punctuation and contractions.
const JOINED = [
  ...Array.from(".?!,", (sign) => [` ${sign}`, sign]),
  [" ' ", "'"],
  [" n't", "n't"],
  [" 'm", "'m"],
  [" do not", " don't"], // only in tokens, not in the whole text
  ...["s", "ve", "re"].map((end) => [` '${end}`, `'${end}`]),
];

function replaced(text, changes) {
  return changes.reduce((found, [spaced, joined]) => found.replaceAll(spaced, joined), text);
}
