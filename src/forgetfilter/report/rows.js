// Rows of a run, or of a sample to mark.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50, BINS = 60, COLOURS = ["#4477aa", "#cc6677", "#ddaa33", "#228833", "#aa3377", "#66ccee", "#999933", "#882255", "#44aa99", "#bb5566", "#0077bb", "#999999"];
const DASHES = [null, "7 3", "2 3", "9 3 2 3"]; // lines are told apart without their colours, too
const { rows, texts, words } = data;
const total = rows.row.length;
const chosen = new Map(); // by hand on this page: place -> words[0] or words[1]
const state = { threshold: data.threshold, moved: false, query: "", filter: "", group: "", page: 0, open: -1, saved: "" };

const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const scored = (place) => rows.score && rows.score[place] !== null;

function decision(place) {
  if (chosen.has(place)) return chosen.get(place);
  if (!rows.score) return "";
  if (!state.moved || rows.hand[place] === "1" || rows.fixed[place] === "1" || !scored(place)) return words[Number(rows.dropped[place])];
  return words[Number(state.threshold !== null && rows.score[place] > state.threshold)];
}

function counts() {
  const found = { kept: 0, dropped: 0, caught: 0, unsafe: 0 };
  for (let place = 0; place < total; place++) {
    const gone = decision(place) === words[1];
    if (gone) found.dropped++;
    else if (decision(place)) found.kept++;
    if (rows.unsafe && rows.unsafe[place] === "1") {
      found.unsafe++;
      if (gone) found.caught++;
    }
  }
  return found;
}

function showCounts() {
  const found = counts();
  const tiles = [["rows", total], [words[0], found.kept], [words[1], found.dropped]];
  if (!rows.score) tiles.push(["to mark", total - found.kept - found.dropped]);
  tiles.push(...(data.notes || []));
  if (rows.unsafe && found.unsafe) {
    tiles.push(["precision", found.dropped ? number(found.caught / found.dropped) : "–"]);
    tiles.push(["recall", number(found.caught / found.unsafe)]);
  }
  if (chosen.size && rows.score) tiles.push(["by hand, here", chosen.size]);
  showCommands();
  $("tiles").replaceChildren(...tiles.map(([name, value]) => el("div", { class: "tile", "data-name": name }, el("b", {}, String(value)), name)));
  if (!rows.score) return;
  $("promise").textContent = state.moved
    ? `${number(state.threshold)}, set by hand here: it carries no promise. Nothing changes in the run before you run the command below.`
    : `As decided: ${data.rule.says}.`;
  say(`${found.kept} kept, ${found.dropped} dropped`);
}

// What to run now. An export has the time in its name, so that none is taken for an earlier one.
const quoted = (name) => (/^[\w.-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`);
function showCommands() {
  const file = quoted(state.saved || data.file);
  const first = state.saved || (rows.score && !byHand().length) ? "" : "   # export first";
  $("export").disabled = !byHand().length;
  if (!rows.score) {
    $("commands").textContent = `forgetfilter decide OUT --trusted_rows ${file}${first}`;
    return;
  }
  const flags = state.moved ? `${data.by}--threshold ${state.threshold}` : data.flags;
  const marks = byHand().length ? ` --decisions ${file}${first}` : "";
  $("commands").textContent = [`forgetfilter decide ${data.folder} ${flags}${marks}`, ...data.commands].join("\n");
}

let speaking;
function say(words) { // to a screen reader, once the slider rests
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("live").textContent = words; }, 600);
}

// Places decided by hand: here, and in the decision this page shows, if the run does not remember them (version 0.1).
function byHand() {
  const places = new Set(chosen.keys());
  for (let place = 0; rows.hand && !data.remembered && place < total; place++) if (rows.hand[place] === "1") places.add(place);
  return [...places].sort((a, b) => rows.row[a] - rows.row[b]);
}

// The histogram: stacked by group, a line at the threshold.
const span = rows.score ? [0, 0] : null;
if (rows.score) {
  const there = rows.score.filter((score) => score !== null);
  span[0] = there.length ? Math.min(0, there[there.length - 1]) : 0;
  span[1] = there.length ? there[0] : 1;
  if (data.threshold !== null) span[1] = Math.max(span[1], data.threshold * 1.2);
  if (span[1] <= span[0]) span[1] = span[0] + 1;
}
const across = (score) => 40 + ((score - span[0]) / (span[1] - span[0])) * 900;

// Kept and dropped by group.
function drawGroups() {
  const tally = data.groups.map(() => [0, 0, 0, 0]);
  for (let place = 0; place < total; place++) {
    const own = tally[rows.group[place]];
    own[0]++;
    own[1 + words.indexOf(decision(place))]++;
    if (!scored(place)) own[3]++;
  }
  const cells = (values, tag) => values.map((value, i) => el(tag, { class: i ? "number" : null, scope: tag === "th" ? "col" : null }, String(value)));
  $("by-group").replaceChildren(
    el("caption", {}, `By ${data.groupName}`),
    el("tr", {}, ...cells([data.groupName, "rows", ...words, "unscored"], "th")),
    ...tally.map((own, i) => el("tr", {}, ...cells([data.groups[i], ...own], "td"))));
}

function drawHistogram() {
  const by = $("by").value;
  const names = by === "group" ? data.groups : by === "label" ? ["safe", "unsafe"] : words;
  const of = by === "group" ? (place) => rows.group[place] : by === "label" ? (place) => Number(rows.unsafe[place]) : (place) => words.indexOf(decision(place));
  const bins = names.map(() => new Array(BINS).fill(0));
  for (let place = 0; place < total; place++) {
    if (!scored(place)) continue;
    const bin = Math.min(BINS - 1, Math.floor(((rows.score[place] - span[0]) / (span[1] - span[0])) * BINS));
    bins[of(place)][bin]++;
  }
  const most = Math.max(1, ...Array.from({ length: BINS }, (_, bin) => bins.reduce((sum, own) => sum + own[bin], 0)));
  const bars = [];
  for (let bin = 0; bin < BINS; bin++) {
    let top = 210;
    bins.forEach((own, i) => {
      const height = (own[bin] / most) * 190;
      top -= height;
      if (own[bin]) bars.push(el("rect", { x: 40 + (bin * 900) / BINS, y: top, width: 900 / BINS - 1, height, fill: colour(by, i) }, el("title", {}, `${names[i]}: ${own[bin]}`)));
    });
  }
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const score = span[0] + part * (span[1] - span[0]);
    return el("text", { x: across(score), y: 228, "text-anchor": "middle" }, score.toFixed(2));
  });
  const line = state.threshold === null ? null : el("line", { id: "limit", x1: across(state.threshold), x2: across(state.threshold), y1: 10, y2: 215, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "5 4" });
  const label = `Histogram of scores from ${span[0].toFixed(2)} to ${span[1].toFixed(2)}, by ${by || "decision"}`;
  $("histogram").replaceChildren(el("svg", { viewBox: "0 0 960 235", role: "img", "aria-label": label }, ...bars, ...ticks, el("text", { x: 4, y: 20 }, String(most)), line));
  $("legend").replaceChildren(...names.map((name, i) => {
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = colour(by, i);
    return el("span", {}, swatch, name);
  }));
}
const colour = (by, i) => (by === "group" ? COLOURS[i % COLOURS.length] : ["var(--kept)", "var(--dropped)"][i]);

// The table.
// A text's turns are [role, text, trained, tokens, levels]; where there are tokens they are the text.
const lower = texts.map((text) => text.turns.map(said).join("\n").toLowerCase());
const textOf = new Map(data.textOf.map((place, i) => [place, i]));
const HAND = "by hand";
const handled = (place) => chosen.has(place) || Boolean(rows.hand && rows.hand[place] === "1");
function found() {
  const places = [], query = state.query.toLowerCase();
  for (let place = 0; place < total; place++) {
    if (state.filter === HAND ? !handled(place) : state.filter && (decision(place) || "open") !== state.filter) continue;
    if (state.group !== "" && rows.group[place] !== Number(state.group)) continue;
    if (query && !(textOf.has(place) && lower[textOf.get(place)].includes(query))) continue;
    places.push(place);
  }
  return places;
}

function choose(place, word) {
  state.saved = "";
  if (chosen.get(place) === word) chosen.delete(place);
  else chosen.set(place, word);
  update();
}

function buttons(place) {
  return words.map((word) => el("button", {
    type: "button", "aria-pressed": String(decision(place) === word), "aria-label": `row ${rows.row[place]}: ${word}`,
    onclick: () => {
      const at = [...document.querySelectorAll("#rows tr[data-place]")].findIndex((row) => Number(row.dataset.place) === place);
      choose(place, word);
      focusOn(place, word, at);
    },
  }, word));
}
function focusOn(place, word, at) { // the table was drawn anew: keep the keyboard where it was, or where rows moved up
  const left = document.querySelectorAll("#rows tr[data-place]");
  const next = left.length ? left[Math.min(at, left.length - 1)].querySelector(".hand button") : $("filter");
  (document.querySelector(`button[aria-label="row ${rows.row[place]}: ${word}"]`) || next)?.focus();
}

function detail(place) {
  const text = texts[textOf.get(place)];
  const cell = el("td", { colspan: $("columns").children.length });
  if (!text) {
    cell.append("The text of this row was left out of the page; it stands in the run's folder, in kept or dropped.");
    return el("tr", { class: "open" }, cell);
  }
  for (const turn of text.turns) cell.append(el("div", { class: "turn" }, el("b", {}, turn[0]), el("span", { dir: "auto" }, ...shaded(turn))));
  if (text.turns.some((turn) => turn[3])) cell.append(el("p", { class: "quiet" }, "Shaded: how much of each token was forgotten."));
  for (const [name, answer] of Object.entries(text.answers || {})) {
    cell.append(el("div", { class: "turn" }, el("b", {}, name), visible(answer)));
  }
  if (text.scores) cell.append(el("p", { class: "quiet" }, Object.entries(text.scores).map(([name, value]) => `${name} ${number(value)}`).join("   ")));
  if (text.reason) cell.append(el("p", {}, text.reason));
  return el("tr", { class: "open" }, cell);
}

function showTable() {
  const places = found();
  const pages = Math.max(1, Math.ceil(places.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const shown = [];
  for (const place of places.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
    const text = texts[textOf.get(place)];
    const open = state.open === place;
    const first = text ? text.turns.filter((turn) => !turn[2]).pop() : null;
    const last = text ? text.turns.filter((turn) => turn[2]).pop() : null;
    const start = text ? (first ? visible(first[1].slice(0, 110)) : "") : "(text left out)";
    const answer = last ? visible(said(last).slice(0, 110)) : "";
    const toggle = el("button", { type: "button", dir: "auto", "aria-expanded": String(open), onclick: () => {
      state.open = open ? -1 : place;
      showTable();
      document.querySelector(`[data-place="${place}"] .text button`)?.focus();
    } }, el("span", { class: "quiet" }, start), " → ", answer);
    const made = decision(place);
    const by = handled(place) ? ` (${chosen.has(place) && rows.score ? "by hand, here" : HAND})` : "";
    shown.push(el("tr", { "data-place": place },
      el("td", { class: "number id" }, String(rows.row[place])),
      rows.score ? el("td", { class: "number" }, number(rows.score[place])) : null,
      el("td", { class: made === words[1] ? "dropped" : "kept" }, rows.score && made ? made + by : made || "open"),
      data.groups.length ? el("td", { class: "group" }, visible(data.groups[rows.group[place]])) : null,
      el("td", { class: "text" }, rows.score ? toggle : el("div", { class: "turn", dir: "auto" }, visible(said(first)))),
      el("td", { class: "hand" }, ...buttons(place))));
    if (open) shown.push(detail(place));
  }
  $("rows").replaceChildren(...shown);
  $("found").textContent = `${places.length} of ${total} rows${rows.score ? ", from most to least suspect" : ""}`;
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("back").disabled = state.page === 0;
  $("on").disabled = state.page >= pages - 1;
}

function update() {
  showCounts();
  if (rows.score) drawHistogram();
  if (rows.score && data.groups.length) drawGroups();
  showTable();
}

function setThreshold(value) {
  if (!Number.isFinite(value)) return;
  state.threshold = value;
  state.moved = true;
  $("slider").value = value;
  if (document.activeElement !== $("threshold")) $("threshold").value = value.toFixed(4);
  update();
}

function download() {
  const lines = byHand().map((place) => {
    const which = rows.id ? { id: rows.id[place] } : { row: rows.row[place] };
    return JSON.stringify(rows.score ? { ...which, decision: decision(place) } : { ...which, clean: decision(place) === words[0] });
  });
  if (!lines.length) return;
  const time = new Date().toISOString().replace(/[-:]|\..*/g, "");
  const name = data.file.replace(/\.jsonl$/, `-${time}.jsonl`);
  const link = el("a", { href: URL.createObjectURL(new Blob(lines.map((line) => line + "\n"), { type: "application/jsonl" })), download: name });
  link.click();
  state.saved = name;
  URL.revokeObjectURL(link.href);
  showCommands();
}

const option = (value, name = value) => el("option", { value }, name);
$("title").textContent = data.title;
$("about").textContent = data.about;
$("export").textContent = `export ${data.file}`;
$("export").title = "into your browser's folder for downloads, with the time in its name";
$("export").addEventListener("click", download);
$("filter").append(option("", "all"), ...words.map((word) => option(word)), option(HAND), ...(rows.score ? [] : [option("open")]));
$("group").append(option("", "all"), ...data.groups.map((name, i) => option(i, name)));
$("group-name").textContent = data.groupName;
$("groups").hidden = !data.groups.length;
$("columns").append(...[["row", "number id"], ...(rows.score ? [["score", "number"]] : []), [data.markName, ""], ...(data.groups.length ? [[data.groupName, "group"]] : []), [rows.score ? "prompt → answer" : "text", ""], ["by hand", ""]].map(([name, kind]) => el("th", { class: kind, scope: "col" }, name)));
$("filter-name").textContent = data.markName;
const isCut = (text) => text.turns.some((turn) => / more characters\)$/.test(said(turn)));
const remarks = [];
if (data.leftOut) remarks.push(`The text of ${data.leftOut} rows, those far from the threshold, was left out of this page; searching finds the others.`);
if (texts.some(isCut)) remarks.push(`${texts.filter(isCut).length} texts are cut; what follows the cut is not searched.`);
$("left-out").textContent = remarks.join(" ");
$("search").addEventListener("input", (event) => { state.query = event.target.value; state.page = 0; showTable(); });
$("filter").addEventListener("change", (event) => { state.filter = event.target.value; state.page = 0; showTable(); });
$("group").addEventListener("change", (event) => { state.group = event.target.value; state.page = 0; showTable(); });
function turn(step, other) {
  state.page += step;
  showTable();
  $("found").scrollIntoView({ block: "start" });
  if (document.activeElement === document.body || document.activeElement.disabled) $(other).focus({ preventScroll: true });
}
$("back").addEventListener("click", () => turn(-1, "on"));
$("on").addEventListener("click", () => turn(1, "back"));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("search").focus();
  }
});
window.addEventListener("beforeunload", (event) => { if (chosen.size && !state.saved) event.preventDefault(); });

if (rows.score) {
  $("rule").textContent = `Rule ${data.rule.name} on ${data.rule.filter}, ${data.threshold === null ? "no threshold" : `threshold ${number(data.threshold)}`}: ${data.rule.says}.${data.planted ? ` ${data.planted}.` : ""}`;
  $("slider").min = span[0];
  $("slider").max = span[1];
  $("slider").value = data.threshold ?? span[1];
  $("threshold").value = data.threshold === null ? "" : data.threshold.toFixed(4);
  $("slider").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
  $("threshold").addEventListener("input", (event) => { if (event.target.value !== "") setThreshold(Number(event.target.value)); });
  $("reset").addEventListener("click", () => {
    state.threshold = data.threshold;
    state.moved = false;
    $("slider").value = data.threshold ?? span[1];
    $("threshold").value = data.threshold === null ? "" : data.threshold.toFixed(4);
    update();
  });
  $("by").append(option("", "decision"), ...(rows.unsafe ? [option("label")] : []), ...(data.groups.length ? [option("group", data.groupName)] : []));
  $("by").addEventListener("change", drawHistogram);
  $("charts").append(...data.curves.map(chart));
  $("losses").append(...data.losses.map(chart));
  $("facts").append(...data.facts.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "text" }, value))));
} else {
  $("rule").textContent = data.rule.says;
  for (const id of ["scores", "curves", "training", "settings"]) $(id).hidden = true;
}

// Lines over a few moments: { name, at: [moment], lines: { name: [value] } }.
function chart({ name, at, lines }) {
  const names = Object.keys(lines), values = Object.values(lines).flat();
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  const x = (i) => 45 + (at.length > 1 ? (i / (at.length - 1)) * 430 : 0), y = (value) => 150 - ((value - low) / (high - low || 1)) * 135;
  const drawn = names.map((line, n) => el("polyline", { points: lines[line].map((value, i) => `${x(i)},${y(value)}`).join(" "), fill: "none", stroke: COLOURS[n % COLOURS.length], "stroke-width": 2, "stroke-dasharray": DASHES[n % DASHES.length] }, el("title", {}, line)));
  const ends = at.length > 6 ? [0, at.length - 1] : at.map((_, i) => i);
  const ticks = ends.map((i) => el("text", { x: x(i), y: 168, "text-anchor": i === 0 ? "start" : i === at.length - 1 ? "end" : "middle" }, at[i]));
  const said = names.map((line) => `${line} from ${number(lines[line][0])} to ${number(lines[line][lines[line].length - 1])}`).join(", ");
  const key = names.length > 1 ? el("div", { class: "legend" }, ...names.map((line, n) => {
    const dash = el("line", { x1: 0, x2: 32, y1: 6, y2: 6, stroke: COLOURS[n % COLOURS.length], "stroke-width": 3, "stroke-dasharray": DASHES[n % DASHES.length] });
    return el("span", {}, el("svg", { class: "dash", viewBox: "0 0 32 12", "aria-hidden": "true" }, dash), line);
  })) : null;
  const picture = el("svg", { viewBox: "0 0 490 176", role: "img", "aria-label": `${name}: ${said}` }, ...drawn, ...ticks, el("text", { x: 2, y: 18 }, high.toFixed(2)), el("text", { x: 2, y: 152 }, low.toFixed(2)));
  return el("figure", {}, el("figcaption", {}, name), key, picture);
}
update();
