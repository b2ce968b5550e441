// Runs the program of an HTML file under node: reads tasks as JSON from stdin, writes results as JSON.
// node html_page.js model.html < tasks.json
const fs = require("fs");
const vm = require("vm");
const page = fs.readFileSync(process.argv[2], "utf8");
const script = page.match(/<script>([\s\S]*)<\/script>/)[1];
const parts = (kind) =>
  [...page.matchAll(new RegExp(`<script type="text/plain" class="${kind}">([^<]*)</script>`, "g"))].map((one) => one[1]);
const names =
  "readModel,Model,tokenizerOf,RandomNumbers,answerOf,promptOf,choose,filtered,penalized,sample,stateKinds,WORDS";
vm.runInThisContext(`${script};globalThis.api = {${names}};`);

async function main() {
  const size = Number(page.match(/data-size="(\d+)"/)[1]);
  const { about, tensors } = await api.readModel(parts("description"), size, parts("weights"));
  const model = new api.Model(about, tensors);
  const tokenizer = api.tokenizerOf(about.tokenizer);
  const run = {
    logits: ({ ids }) => {
      model.truncate(0);
      return ids.map((id) => Array.from(model.step(id)));
    },
    attention: ({ layer, position }) => model.attentionOf(layer, position).map((one) => Array.from(one)),
    lens: ({ position }) => model.trace[position].states.map((state) => Array.from(model.project(state))),
    kinds: () => api.stateKinds(model),
    encode: ({ texts }) => texts.map((text) => tokenizer.encode(text)),
    decode: ({ rows }) => rows.map((ids) => tokenizer.decode(ids)),
    prompt: ({ turns, text, room, thinking }) => api.promptOf(about, tokenizer, turns, text, room ?? 1e9, thinking),
    answer: ({ ids, options, uniform, seed }) => {
      const numbers = seed === undefined ? null : new api.RandomNumbers(seed);
      const found = [];
      for (const one of api.answerOf(model, about, ids, options, (i) => (numbers ? numbers.next() : uniform[i]))) {
        if (one.id !== undefined) found.push(one.id);
      }
      return found;
    },
    choose: ({ logits, ids, options, u }) => api.choose(Float32Array.from(logits), ids, options, about.tokens, u),
    random: ({ seed, count }) => {
      const numbers = new api.RandomNumbers(BigInt(seed));
      return Array.from({ length: count }, () => numbers.next());
    },
    words: () => api.WORDS,
  };
  const tasks = JSON.parse(fs.readFileSync(0, "utf8"));
  process.stdout.write(JSON.stringify(tasks.map((task) => run[task.do](task))));
}

main().catch((error) => {
  process.stderr.write(`${error.name}: ${error.message}\n`);
  process.exit(3);
});
