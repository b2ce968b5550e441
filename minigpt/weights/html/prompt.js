// The prompt: the ids that the model reads, in the form that it was trained on.
//
//   question   the question, then the separator
//   chat       all turns, between the pieces of the model's chat template
//   text       the text, which the model continues

// turns: all earlier turns, [{said, ids, answer}, ...]. Returns the ids, and the number of first turns left out.
function promptOf(about, tokenizer, turns, text, room, thinking) {
  if (about.form === "question") return { ids: [...tokenizer.encode(text), about.separator], left: 0 };
  if (about.form === "text") {
    const ids = tokenizer.around(tokenizer.encode(text));
    return { ids: ids.length || about.start === null ? ids : [about.start], left: 0 };
  }
  const first = about.chat.between ? 0 : turns.length;
  for (let left = first; ; left++) {
    const ids = chatIds(about, tokenizer, turns.slice(left), text, thinking);
    if (ids.length <= room || left === turns.length) return { ids, left };
  }
}

function chatIds(about, tokenizer, turns, text, thinking) {
  const { head, between, tails, thoughtsEnd, trims } = about.chat;
  const said = (content) => (trims ? content.trim() : content);
  const pieces = [...head];
  for (const turn of turns) {
    pieces.push(said(turn.said), ...between[0], ...answerPieces(turn, about, thoughtsEnd), ...between[1]);
  }
  pieces.push(said(text), ...(thinking === false && tails.off ? tails.off : tails.on));
  // Neighbouring texts are joined before encoding, because a token may cross their border.
  const ids = [];
  let open = "";
  for (const piece of [...pieces, null]) {
    if (typeof piece === "string") open += piece;
    else {
      ids.push(...tokenizer.encode(open));
      open = "";
      if (piece !== null) ids.push(piece);
    }
  }
  return ids;
}

// An answer keeps the ids that the model wrote, unless the template removes the model's thoughts.
function answerPieces(turn, about, thoughtsEnd) {
  const ids = about.eos.includes(turn.ids[turn.ids.length - 1]) ? turn.ids.slice(0, -1) : turn.ids;
  if (!thoughtsEnd || !turn.answer.includes(thoughtsEnd)) return ids;
  const kept = turn.answer.slice(turn.answer.lastIndexOf(thoughtsEnd) + thoughtsEnd.length);
  return [kept.replace(/^\n+/, "")];
}

// Generate an answer. Yields {id, u, chosen} for each token, so that the caller can pause between tokens.
// uniform(i) returns the random number for token i.
function* answerOf(model, about, prompt, options, uniform) {
  const limit = Math.min(options.max_new_tokens, model.context - prompt.length);
  const known = model.reuse(prompt);
  for (let i = known; i < prompt.length - 1; i++) {
    model.step(prompt[i], false);
    yield { read: i + 1, of: prompt.length };
  }
  const ids = [...prompt];
  for (let count = 0; count < limit; count++) {
    const logits = model.step(ids[ids.length - 1]);
    const u = options.do_sample ? uniform(count) : null;
    const id = choose(logits, ids, options, about.tokens, u);
    ids.push(id);
    yield { id, u };
    if (about.eos.includes(id)) return;
  }
}
