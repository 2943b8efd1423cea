"use strict";
// What the scripts of all pages share. Everything from the data reaches a page as text, never as markup.
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "text", "polyline", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
// A message of a row is [role, text, trained] and, where its tokens are known, their texts and levels of shading.
const said = (turn) => (turn[3] ? turn[3].join("") : turn[1]);

// A message's text, shaded: neighbouring tokens of one level together, those of level 0 as plain text.
function shaded(turn) {
  if (!turn[3]) return [visible(turn[1])];
  const runs = [];
  turn[3].forEach((token, i) => {
    const last = runs[runs.length - 1];
    if (last && last.level === turn[4][i]) last.text += token;
    else runs.push({ level: turn[4][i], text: token });
  });
  return runs.map(({ level, text }) => (Number(level) ? el("span", { "data-level": level }, visible(text)) : visible(text)));
}
// Characters that show nothing, or turn text around, are spelt out: a model reads them, so a person must, too.
const visible = (text) => text.replace(/[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0d\ufeff\u{e0000}-\u{e0fff}]/gu, (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase()}⟩`);

