// One row at a time, large; what a person says of it goes to the server, which ranks all rows anew.
const about = JSON.parse($("data").textContent);
const WORDS = { clean: "keep", unsafe: "drop", skipped: "skip" };
const SETTLE = 150; // milliseconds in which a key or a click is left out after a row has shown: it was meant for the row before
const TWICE = 400; // the same for the second click of a double click
let state = null;
let busy = false;
let shownAt = 0;
let lost = null; // a mark whose answer never came: the server may have written it
const mine = []; // what was said of which row on this page, the last statement last: what undo takes back

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options).catch(() => {
    throw new Error("The server has stopped. Start `forgetfilter review` again: every mark is on disk.");
  });
  const answer = await response.json().catch(() => ({ error: `The server's answer (${response.status}) makes no sense.` }));
  if (!response.ok) throw Object.assign(new Error(answer.error), { refused: response.status === 400 });
  return answer;
}

// One request at a time. A key pressed meanwhile is left out, so that no mark lands on a row that was not seen yet.
async function show(path, body) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  let settled = true;
  const slow = setTimeout(() => { $("trouble").textContent = "Still waiting for the server…"; }, 3000);
  try {
    state = await ask(path, body);
    if (path === "mark" && body.said !== body.seen) mine.push(body);
    lost = null;
    $("trouble").textContent = "";
    if (body) $("decided").replaceChildren();
    draw();
  } catch (error) {
    clearTimeout(slow);
    $("trouble").textContent = error.message;
    settled = Boolean(error.refused); // a full disk or a server that has stopped: it can be tried again
    if (!settled && path === "mark") lost = body;
    if (settled && body) { // the row was marked elsewhere: show what is said of it now
      state = await ask(path === "mark" ? `state?row=${body.row}` : "state").catch(() => state);
      if (lost && lost.row === body.row && state.question && state.question.said === lost.said) { // it was marked here
        mine.push(lost);
        if (body.said === lost.said) $("trouble").textContent = "";
      }
      lost = null;
      draw();
    }
  }
  clearTimeout(slow);
  if (path === "undo" && settled) mine.splice(mine.findLastIndex((one) => one.row === body.row), 1); // also if it was taken back elsewhere
  busy = false;
  document.body.removeAttribute("aria-busy");
}

function draw() {
  const row = state.question;
  $("status").textContent = `${state.status}.`;
  $("why").textContent = row ? visible(`Row ${row.row}${row.id === String(row.row) ? "" : ` (${row.id})`}: ${row.why}${row.rank === null ? "" : `; rank ${row.rank} of ${about.rows}, 1 = most suspect`}${row.said ? `; marked: ${WORDS[row.said]}` : ""}.`) : "Every row is marked.";
  $("row").replaceChildren(...(row ? row.turns.map((turn) => el("div", { class: turn[2] ? "turn answer" : "turn" }, el("b", {}, turn[0]), el("span", { dir: "auto" }, ...shaded(turn)))) : []));
  $("shaded").hidden = !row || !row.turns.some((turn) => turn[3]);
  for (const [said, id] of Object.entries(WORDS)) {
    $(id).disabled = !row;
    $(id).setAttribute("aria-pressed", String(Boolean(row) && row.said === said));
  }
  $("undo").disabled = !state.marked.length;
  $("next").disabled = !state.ahead.length;
  $("ahead").replaceChildren(...state.ahead.map((one) => item(one, "")));
  $("marked").replaceChildren(...state.marked.map((one) => item(one, WORDS[one.said])));
  $("more").textContent = state.more ? `and ${state.more} before them` : "";
  $("spoken").textContent = row ? `${$("why").textContent} ${row.turns.map((turn) => `${turn[0]}: ${visible(said(turn))}`).join("\n").slice(0, 2000)}` : "";
  shownAt = Infinity; // until the row is painted
  requestAnimationFrame(() => setTimeout(() => { shownAt = performance.now(); }));
  $("row").scrollTop = 0;
  $("row").focus({ preventScroll: true });
  $("why").scrollIntoView({ block: "nearest" }); // in a narrow window the lists lie below the row
}

function item(one, word) {
  const mark = word ? el("span", { class: word === "drop" ? "dropped" : "kept" }, `${word} `) : null;
  return el("li", {}, el("button", { type: "button", dir: "auto", onclick: () => show(`state?row=${one.row}`) }, mark, visible(one.start) || `row ${one.row}`));
}

const mark = (said) => () => { if (state && state.question) show("mark", { row: state.question.row, said, seen: state.question.said }); };
const actions = {
  keep: mark("clean"),
  drop: mark("unsafe"),
  skip: mark("skipped"),
  undo: () => {
    if (!state || !state.marked.length) return;
    const { row, said } = mine.length ? mine[mine.length - 1] : state.marked[0];
    show("undo", { row, seen: said });
  },
  next: () => { if (state && state.ahead.length) show(`state?row=${state.ahead[0].row}`); },
};

// A click or a key that was meant for the row before.
const early = (event) => event.timeStamp - shownAt <= (event.detail > 1 ? TWICE : SETTLE);

async function decide(event) {
  if (busy || early(event)) return;
  busy = true;
  $("decided").replaceChildren(el("p", {}, "Writing kept and dropped rows…"));
  try {
    const made = await ask("done", {});
    $("decided").replaceChildren(
      el("p", {}, `${made.kept} of ${made.rows} rows kept, ${made.dropped} dropped. Dropped rows: ${made.says}. Kept and dropped rows, scores and report.html are in ${about.folder}; you may close this page, or go on marking.`),
      el("pre", {}, `forgetfilter finetune ${made.folder}`));
  } catch (error) {
    $("decided").replaceChildren(el("p", { role: "alert" }, error.message));
  }
  busy = false;
}

$("about").textContent = `${about.rows} rows in ${about.folder}. Keep what you would be glad to see a model learn. Each mark is on disk at once, and all rows are ranked anew.`;
for (const [id, action] of Object.entries(actions)) {
  $(id).addEventListener("click", (event) => { if (!early(event)) action(); });
}
$("done").addEventListener("click", decide);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !$("keys").checked || event.target === $("done")) return;
  const latin = /^[\x00-\x7f]+$/.test(event.key); // else the key's place on the keyboard counts
  const key = latin ? event.key.toLowerCase() : event.code.replace(/^Key/, "").toLowerCase();
  const id = Object.keys(actions).find((name) => name[0] === key);
  if (id && !$(id).disabled) {
    event.preventDefault();
    if (!early(event)) actions[id]();
  }
});
show("state");
