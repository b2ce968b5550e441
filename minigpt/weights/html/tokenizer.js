// Text <-> ids, for the tokenizers of minigpt: single characters, and byte-level BPE.
//
// The text of a special token never becomes that token: what a user types is text.

function tokenizerOf(about) {
  return about.kind === "characters" ? new Characters(about) : new BytePairs(about);
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

  // A token's text for people.
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
    text = text.replace(/\p{Cs}/gu, "\ufffd"); // half a character has no bytes
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

// The printable character that stands for each byte in the files of a byte-level vocabulary.
function byteSymbols() {
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte >= 33 && byte < 127) || (byte >= 161 && byte < 173) || byte >= 174;
    return String.fromCodePoint(printable ? byte : others++);
  });
}
