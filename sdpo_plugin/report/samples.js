// Samples: a filtered list, and the chosen sample token by token.
const { runs, vocabulary, levels } = JSON.parse(document.getElementById("samples-data").textContent);
const PAGE = 100; // rows of the list
const MINUS = "\u2212";
const samples = runs.flatMap((run, number) => run.shown.map((sample) => ({ ...sample, run, number, text: run.prompts[sample.prompt][0], asked: run.prompts[sample.prompt][1] })));
let found = [];
let listed = PAGE;
let chosen = null;
const byId = (id) => document.getElementById(id);
const filters = byId("filters");
const list = byId("list");
const detail = byId("detail");

const signed = (value) => `${value < 0 ? MINUS : "+"}${Math.abs(value).toFixed(2)}`;
const nats = (value) => (value === null ? "–" : `${value < 0 ? MINUS : ""}${Math.abs(value).toFixed(2)}`);
const percent = (logProb) => {
  const share = 100 * Math.exp(logProb);
  return share >= 99.95 || share === 0 ? `${share.toFixed(0)}%` : share < 0.1 ? "<0.1%" : `${share.toFixed(share < 10 ? 1 : 0)}%`;
};
const line = (text) => text.replace(/\s+/g, " ").trim();
const plain = (text) => line(text.replace(/<\|[^|<>]{1,40}\|>/g, " ")); // without a chat template's tokens
const piece = (id) => vocabulary[id].replaceAll(" ", "\u2423"); // a token by itself

// log T − log S of a token; null where it is not in the loss or nobody scored it.
function advantage(sample, i) {
  const [s, t] = [sample.student[i] ?? null, sample.teacher[i] ?? null];
  return sample.in_loss[i] === "1" && s !== null && t !== null ? t - s : null;
}

function level(value) {
  const strength = levels.filter((bound) => Math.abs(value) >= bound).length;
  return value > 0 ? strength : -strength;
}

function opinion(value) {
  const strength = Math.abs(level(value));
  if (!strength) return "teacher and student agree";
  return `the teacher finds it ${["slightly", "", "much", "far"][strength - 1]} ${value > 0 ? "more" : "less"} likely`.replace("  ", " ");
}

function token(sample, i) {
  const value = advantage(sample, i);
  const node = make("span", { className: "token", textContent: vocabulary[sample.tokens[i]] });
  if (value === null) node.classList.add("out");
  else if (level(value)) node.dataset.level = level(value);
  return node;
}

// Arrow keys move among the children of `box`, one of which Tab reaches.
function roving(box, keys, go) {
  box.addEventListener("keydown", (event) => {
    const all = [...box.children];
    const now = all.indexOf(document.activeElement);
    const to = { [keys[0]]: now - 1, [keys[1]]: now + 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || now < 0 || !all[to]) return;
    event.preventDefault();
    reach(box, all[to]);
    all[to].focus();
    go(to);
  });
}

function reach(box, node) {
  box.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
  node?.setAttribute("tabindex", "0");
}

// --- the list

function field(name, words, initial, step) {
  return make("label", {}, make("span", { textContent: words }), make("input", { type: "number", name, value: initial, step, inputMode: "decimal" }));
}

function buildFilters() {
  const recorded = runs.filter((run) => run.shown.length);
  const steps = samples.map((sample) => sample.step);
  const rewards = samples.map((sample) => sample.reward).filter((reward) => reward !== null);
  const range = (words, ...fields) => make("fieldset", {}, make("legend", { textContent: words }), ...fields);
  const options = (name, words, entries) => make("label", {}, make("span", { textContent: words }),
    make("select", { name }, ...entries.map(([value, text]) => make("option", { value, textContent: text }))));
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  filters.append(
    ...(recorded.length > 1 ? [options("run", "Run", [["", "all"], ...runs.map((run, i) => [i, run.name])])] : []),
    range("Step", field("from", "from", least(steps), 1), field("to", "to", most(steps), 1)),
    ...(rewards.length ? [range("Reward", field("lowest", "from", least(rewards), "any"), field("highest", "to", most(rewards), "any"))] : []),
    range("Disagreement", field("disagreement", "at least", 0, "any")),
    options("order", "Order", [["step", "by step"], ["most", "most disagreement first"], ["worst", "lowest reward first"]]),
  );
  filters.hidden = false;
  filters.addEventListener("input", () => ((listed = PAGE), filter()));
  filters.addEventListener("submit", (event) => event.preventDefault());
}

function filter() {
  const asked = Object.fromEntries(new FormData(filters));
  const bound = (name, otherwise) => (asked[name] === undefined || asked[name] === "" ? otherwise : Number(asked[name]));
  const rewardAsked = ["lowest", "highest"].some((name) => filters.elements[name] && asked[name] !== filters.elements[name].defaultValue);
  found = samples.filter((sample) =>
    (!asked.run || sample.number === Number(asked.run))
    && sample.step >= bound("from", -Infinity) && sample.step <= bound("to", Infinity)
    && (sample.reward === null ? !rewardAsked : sample.reward >= bound("lowest", -Infinity) && sample.reward <= bound("highest", Infinity))
    && (sample.disagreement ?? 0) >= bound("disagreement", 0));
  const value = { most: (s) => -(s.disagreement ?? -1), worst: (s) => s.reward ?? Infinity, step: () => 0 }[asked.order];
  found.sort((a, b) => value(a) - value(b) || a.step - b.step || a.number - b.number || a.sample - b.sample);
  show();
  if (!found.includes(chosen)) choose(found[0] ?? null);
}

function facts(sample) {
  return [
    make("b", { textContent: `step ${sample.step}` }),
    make("span", { className: sample.reward ? "reward good" : "reward", textContent: `reward ${sample.reward ?? "none"}` }),
    make("span", { className: "much", textContent: sample.disagreement === null ? "no teacher" : `Δ ${sample.disagreement.toFixed(2)}` }),
  ];
}

function row(sample) {
  const node = make("div", { className: "row", tabIndex: -1, aria: { role: "option", selected: String(sample === chosen) } },
    make("p", { className: "facts" }, runs.length > 1 ? make("i", { className: "swatch", title: sample.run.name }) : null, ...facts(sample)),
    make("p", { className: "snippet", dir: "auto", textContent: plain(sample.text.slice(-300)).slice(-120) }),
    make("p", { className: "snippet answer", dir: "auto", textContent: plain(sample.response.slice(0, 200)) || "(empty)" }));
  node.style.setProperty("--colour", `var(--run-${sample.number % 6})`);
  node.addEventListener("click", () => choose(sample, true));
  node.addEventListener("focus", () => reach(list, node));
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(sample, true);
  });
  return node;
}

function show() {
  list.replaceChildren(...found.slice(0, listed).map(row));
  list.firstElementChild?.setAttribute("tabindex", "0");
  byId("more").hidden = found.length <= listed;
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples`;
}

// --- one sample

function choose(sample, go = false) {
  chosen = sample;
  found.slice(0, listed).forEach((one, i) => list.children[i].setAttribute("aria-selected", String(one === sample)));
  if (!sample) {
    detail.replaceChildren(make("p", { className: "lead", textContent: "No sample passes the filters." }));
    return;
  }
  reach(list, list.children[found.indexOf(sample)] ?? list.firstElementChild);
  detail.replaceChildren(...parts(sample));
  detail.scrollTop = 0;
  if (go && byId("detail").getBoundingClientRect().top > innerHeight * 0.6) detail.scrollIntoView({ block: "start" });
}

function block(title, ...children) {
  return make("section", {}, make("h4", { textContent: title }), ...children);
}

const text = (value) => make("pre", { className: "text", dir: "auto", tabIndex: 0, textContent: value });

function parts(sample) {
  const notes = [
    `${sample.length.toLocaleString("en")} tokens`,
    sample.truncated ? "truncated at the length limit" : null,
    sample.active ? null : "no teacher scored it",
  ].filter(Boolean);
  return [
    make("h3", { tabIndex: -1, textContent: `${runs.length > 1 ? `${sample.run.name}, ` : ""}step ${sample.step}, sample ${sample.sample}` }),
    make("p", { className: "facts" }, ...facts(sample).slice(1), ...notes.map((note) => make("span", { textContent: note }))),
    block("Prompt", text(sample.text)),
    response(sample),
    sample.feedback === null ? block("Feedback", make("p", { className: "lead", textContent: "None." })) : block("Feedback", text(sample.feedback)),
    teacherPrompt(sample),
    overSteps(sample),
  ];
}

function legend() {
  const scale = [...levels].reverse().map((_, i) => i - levels.length).concat(0, levels.map((_, i) => i + 1));
  const word = (at) => {
    if (!at) return "≈";
    return `${at < 0 ? MINUS : "+"}${levels[Math.abs(at) - 1]}`;
  };
  return make("p", { className: "legend" }, make("span", { textContent: "teacher: less likely" }),
    ...scale.map((at) => {
      const node = make("span", { className: "token", textContent: word(at) });
      if (at) node.dataset.level = at;
      return node;
    }), make("span", { textContent: "more likely (log T − log S, nats)" }));
}

function response(sample) {
  if (!sample.tokens.length) return block("Response", text(sample.response || "(empty)"));
  const box = make("div", { className: "tokens", dir: "ltr", aria: { role: "group", label: "Response, token by token. Left and right arrow keys move." } });
  const card = make("div", { className: "inspector", aria: { live: "polite", atomic: "true" } });
  let pinned = disputed(sample);
  const nodes = sample.tokens.map((_, i) => {
    const node = token(sample, i);
    node.tabIndex = i ? -1 : 0;
    node.setAttribute("role", "button");
    const value = advantage(sample, i);
    node.setAttribute("aria-label", `${node.textContent}: ${value === null ? "not in the loss" : `${signed(value)}, ${opinion(value)}`}`);
    return node;
  });
  const inspect = (i) => {
    box.querySelector(".now")?.classList.remove("now");
    if (i === null) return card.replaceChildren(make("p", { className: "lead", textContent: "Point at a token, or select it with Tab and the arrow keys, to see the teacher's distribution." }));
    nodes[i].classList.add("now");
    card.replaceChildren(...inspected(sample, i));
  };
  const pin = (i) => inspect((pinned = i));
  box.append(...nodes);
  box.addEventListener("pointerover", (event) => event.pointerType === "mouse" && nodes.includes(event.target) && inspect(nodes.indexOf(event.target)));
  box.addEventListener("pointerleave", () => inspect(pinned));
  box.addEventListener("click", (event) => nodes.includes(event.target) && (reach(box, event.target), pin(nodes.indexOf(event.target))));
  box.addEventListener("focusin", (event) => nodes.includes(event.target) && pin(nodes.indexOf(event.target)));
  roving(box, ["ArrowLeft", "ArrowRight"], pin);
  inspect(pinned);
  const more = sample.length - sample.tokens.length;
  return block("Response", legend(), box,
    more > 0 ? make("p", { className: "lead", textContent: `${more.toLocaleString("en")} more tokens are in samples.jsonl.` }) : null, card);
}

// The token on which student and teacher differ most, shown until a reader selects another; null without a teacher.
function disputed(sample) {
  let most = null;
  sample.tokens.forEach((_, i) => {
    const value = advantage(sample, i);
    if (value !== null && (most === null || Math.abs(value) > Math.abs(advantage(sample, most)))) most = i;
  });
  return most;
}

function inspected(sample, i) {
  const value = advantage(sample, i);
  const [s, t] = [sample.student[i] ?? null, sample.teacher[i] ?? null];
  const said = (name, logProb) => make("span", {}, make("small", { textContent: name }), logProb === null ? "–" : `${percent(logProb)} (${nats(logProb)})`);
  const head = make("p", { className: "facts" }, make("code", { textContent: piece(sample.tokens[i]) }),
    said("student", s), said("teacher", t),
    make("span", {}, make("small", { textContent: "log T − log S" }), make("b", { textContent: value === null ? "–" : signed(value) }),
      ` ${value === null ? "not in the loss" : opinion(value)}`));
  const flat = sample.alternatives[i] ?? [];
  if (!flat.length) return [head];
  const rows = [];
  for (let k = 0; k < flat.length; k += 2) {
    const bar = make("i", { className: "part" });
    bar.style.width = `${100 * Math.exp(flat[k + 1] ?? -Infinity)}%`;
    const same = flat[k] === sample.tokens[i];
    rows.push(make("li", { className: same ? "same" : "" }, make("code", { textContent: piece(flat[k]) }),
      make("span", { className: "track" }, bar), make("span", { textContent: flat[k + 1] === null ? "–" : percent(flat[k + 1]) })));
  }
  return [head, make("p", { className: "caption", textContent: "The teacher's likeliest here" }), make("ol", { className: "alternatives" }, ...rows)];
}

// Where the context stands in the teacher's prompt: between what it shares with the student's prompt, or, where that
// is messages, between the last message and the chat template's end.
function context(sample) {
  const [own, read] = [sample.text, sample.teacher_prompt];
  if (sample.asked !== null) {
    const at = sample.asked ? read.indexOf(sample.asked) : -1;
    if (at < 0) return null;
    const [from, tail] = [at + sample.asked.length, read.slice(-200)]; // short: no text may keep the pattern busy
    const closing = /(?:<[^<>\s]{1,40}>\s{0,2}\w{0,20}\s{0,2})*$/.exec(tail)[0].length;
    return [from, Math.max(from, read.length - closing)];
  }
  let before = 0, behind = 0;
  while (before < Math.min(own.length, read.length) && own[before] === read[before]) before++;
  while (behind < Math.min(own.length, read.length) - before && own.at(-1 - behind) === read.at(-1 - behind)) behind++;
  return [before, read.length - behind];
}

function teacherPrompt(sample) {
  if (sample.teacher_prompt === null) return block("Teacher’s prompt", make("p", { className: "lead", textContent: "None: the sample has no teacher." }));
  const [read, found] = [sample.teacher_prompt, context(sample)];
  const [from, to] = found ?? [read.length, read.length];
  const pre = text("");
  const places = Object.entries(sample.truncated_at).flatMap(([name, all]) => all.map((at) => [at, name])).sort((a, b) => a[0] - b[0]);
  // What is read from `start` to `end`, with a sign where something is missing.
  const pieces = (start, end) => {
    const inside = places.filter(([at]) => at >= start && (at < end || end === read.length));
    const ends = [...inside.map(([at]) => at), end];
    return [read.slice(start, ends[0]), ...inside.flatMap(([at, name], i) =>
      [make("b", { className: "truncated", textContent: `✂ ${name} truncated here ✂` }), read.slice(at, ends[i + 1])])];
  };
  pre.append(...pieces(0, from), make("mark", {}, ...pieces(from, to)), ...(to < read.length ? pieces(to, read.length) : []));
  const names = Object.keys(sample.truncated_at);
  const truncated = names.length ? make("b", { className: "truncated", textContent: ` ✂ Truncated to fit: ${names.join(", ")}.` }) : " Nothing was truncated to fit.";
  return block("Teacher’s prompt", make("p", { className: "lead" }, found ? "Marked: what the student’s prompt does not have." : "", truncated), pre);
}

function overSteps(sample) {
  const same = samples.filter((one) => one.run === sample.run && one.prompt === sample.prompt).sort((a, b) => a.step - b.step || a.sample - b.sample);
  if (same.length < 2) return block("The same prompt over the steps", make("p", { className: "lead", textContent: "It was recorded once." }));
  const rows = same.map((one) => {
    const answer = make("span", { className: "tokens few", dir: "ltr" }, ...one.tokens.slice(0, 60).map((_, i) => token(one, i)), one.length > 60 ? "…" : "");
    if (!one.tokens.length) answer.textContent = line(one.response.slice(0, 200)) || "(empty)";
    const open = make("button", { type: "button", textContent: one.step, aria: { label: `Step ${one.step}, sample ${one.sample}` } });
    open.addEventListener("click", () => (choose(one), detail.querySelector("h3").focus()));
    return make("tr", { className: one === sample ? "now" : "", aria: one === sample ? { current: "true" } : {} },
      make("td", {}, open), make("td", { textContent: one.reward ?? "–" }),
      make("td", { textContent: one.disagreement === null ? "–" : one.disagreement.toFixed(2) }), make("td", {}, answer));
  });
  const heads = ["step", "reward", "Δ", "response"].map((name) => make("th", { scope: "col", textContent: name }));
  return block("The same prompt over the steps", make("div", { className: "scroll" },
    make("table", { className: "steps" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows))));
}

// --- what was recorded, in words

function words(run) {
  const name = runs.length > 1 ? `${run.name}: ` : "";
  const all = `${run.recorded.toLocaleString("en")} samples of ${run.steps.toLocaleString("en")} ${run.steps === 1 ? "step" : "steps"}`;
  if (run.shown.length === run.recorded) return `${name}${all}.`;
  return `${name}${run.shown.length.toLocaleString("en")} of ${all}, of evenly spaced steps; samples.jsonl has all.`;
}

const delta = samples.length ? " Δ: mean |log T − log S| over a sample’s tokens in the loss, in nats." : "";
const without = runs.filter((run) => !run.recorded).map((run) => run.name);
const lack = without.length ? ` ${without.join(", ")}: no samples were recorded; --diagnostics.log_samples N records N a step.` : "";
byId("recorded").textContent = (runs.filter((run) => run.recorded).map(words).join(" ") + lack + delta).trim();
if (samples.length) {
  document.querySelector(".panes").hidden = false;
  buildFilters();
  roving(list, ["ArrowUp", "ArrowDown"], (to) => choose(found[to]));
  byId("more").addEventListener("click", () => ((listed += PAGE), show(), choose(chosen)));
  filter();
}
document.documentElement.dataset.samples = "ready";
