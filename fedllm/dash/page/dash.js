// Dash - draws the pages that the server makes as JSON (fedllm/dash/blocks.py) and asks for them again while it is looked
// at. Every text becomes a text node: nothing that a file says can become an element or an address of another place.
const POLL = 2000; // milliseconds between two questions
const PATIENCE = 15000; // until a question counts as unanswered
const WIDTH = 360; // units of a chart, as in fedllm/report/chart.py
const HEIGHT = 170;
const MARKED = 40; // above so many points a line has no markers
const DASHES = ["", "5 3", "2 3", "9 3", "7 2 2 2", "", "5 3", "2 3"];
const MARKS = ["M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0", "M-2.3-2.3h4.6v4.6h-4.6z", "M0-3L3 2.2H-3z", "M0-3.2L3.2 0L0 3.2L-3.2 0z"];
const SVG = "http://www.w3.org/2000/svg";

const live = document.getElementById("live");
const head = document.getElementById("head");
const body = document.getElementById("sections");
const held = new Map(); // what stands on the page, so that only what is new is drawn again
let mark = "";
let shown = null; // the run whose page is shown; undefined is none that was asked for yet
let heard = null;
let timer = 0;

// --- elements --------------------------------------------------------------------------------------------------------

function element(name, kind, ...children) {
  const found = document.createElement(name);
  if (kind) found.className = kind;
  found.append(...children.filter((child) => child !== null && child !== undefined));
  return found;
}

function drawing(name, facts, ...children) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(facts)) found.setAttribute(key, String(value));
  found.append(...children);
  return found;
}

function moment(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return document.createTextNode(String(iso));
  const day = at.toDateString() === new Date().toDateString() ? {} : { year: "numeric", month: "short", day: "numeric" };
  const found = element("time", "", at.toLocaleString("en-GB", { ...day, hour: "2-digit", minute: "2-digit", second: "2-digit" }));
  found.dateTime = iso;
  found.title = `${at.toISOString().slice(0, 19).replace("T", " ")} UTC`;
  return found;
}

function cell(value) {
  if (typeof value === "string") return document.createTextNode(value);
  if (value.time !== undefined) return moment(value.time);
  if (value.run !== undefined) {
    const found = element("a", "", value.text);
    found.href = `#run=${encodeURIComponent(value.run)}`;
    return found;
  }
  return element("span", `tone ${value.tone}`, value.text);
}

// --- blocks ----------------------------------------------------------------------------------------------------------

const BLOCKS = {
  text: (block) => element("p", `words ${block.kind}`, block.text),
  list: (block) => element("ul", "list", ...block.items.map((item) => element("li", "", item))),
  facts: (block) => element("dl", "", ...block.items.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", cell(value))])),
  bar,
  table,
  chart,
};

function bar(block) {
  const full = element("progress", block.share >= 0.9 ? "full" : "");
  full.max = 1;
  full.value = block.share;
  full.setAttribute("aria-label", `${block.label}: ${block.text}`);
  return element("div", "bar", element("p", "label", block.label, element("span", "", block.text)), full);
}

function table(block) {
  const found = element("table", block.heads.every((one) => one.number) ? "plain numbers" : "plain", element("caption", "", block.caption));
  const kind = (one) => [one.number ? "number" : "", one.minor ? "minor" : ""].join(" ").trim();
  const top = element("tr", "");
  for (const one of block.heads) {
    const name = element("th", kind(one), one.text);
    name.scope = "col";
    top.append(name);
  }
  const rows = element("tbody", "");
  for (const row of block.rows) {
    const line = element("tr", "");
    row.forEach((value, place) => {
      const one = block.heads[place];
      const size = (typeof value === "string" ? value : value.text || "").length;
      const long = size > 60 ? "text long" : size > 20 ? "long" : "";
      const found = element(place ? "td" : "th", `${kind(one)} ${long}`.trim(), cell(value));
      if (!place) found.scope = "row";
      found.dataset.head = one.text;
      line.append(found);
    });
    rows.append(line);
  }
  found.append(element("thead", "", top), rows);
  return found;
}

function chart(block) {
  const text = (x, y, words, kind, anchor) => drawing("text", { x, y, class: kind, "text-anchor": anchor }, words);
  const wide = (words) => words.length * 6.3;
  const parts = [];
  let [across, top] = [0, 0];
  for (const line of block.lines) {
    const needed = wide(line.name) + 32;
    if (across && across + needed - 16 > WIDTH) [across, top] = [0, top + 16];
    parts.push(marker(across + 5, top + 7, line.tone), text(across + 14, top + 11, line.name, "ink", "start"));
    across += needed;
  }
  top += 26;
  const left = Math.max(...block.y.map(([, words]) => wide(words))) + 8;
  const right = WIDTH - 18;
  const [low, high] = [block.y[0][0], block.y[block.y.length - 1][0]];
  const xs = block.lines.flatMap((line) => line.points.filter(([, y]) => y !== null).map(([x]) => x));
  const [first, last] = xs.reduce(([least, most], x) => [Math.min(least, x), Math.max(most, x)], [Infinity, -Infinity]);
  const at = (x, y) => [
    left + (last > first ? (x - first) / (last - first) : 0.5) * (right - left),
    top + HEIGHT - ((y - low) / (high - low)) * HEIGHT,
  ];
  for (const [value, words] of block.y) {
    const y = at(first, value)[1];
    parts.push(drawing("path", { d: `M${left} ${y}H${right}`, class: "grid" }), text(left - 5, y + 4, words, "", "end"));
  }
  for (const [value, words] of block.x) {
    const x = at(value, low)[0];
    const edge = x + wide(words) / 2 > WIDTH;
    parts.push(text(edge ? WIDTH : x, top + HEIGHT + 15, words, "", edge ? "end" : "middle"));
  }
  parts.push(text((left + right) / 2, top + HEIGHT + 30, block.label, "", "middle"));
  for (const line of block.lines) parts.push(...curve(line, at));
  const name = drawing("title", {}, block.title);
  const words = drawing("desc", {}, block.words);
  const facts = { viewBox: `0 0 ${WIDTH} ${top + HEIGHT + 36}`, role: "img", "aria-label": `${block.title}. ${block.words}` };
  const note = block.note ? element("figcaption", "", block.note) : null;
  return element("figure", "", element("h3", "", block.title), drawing("svg", facts, name, words, ...parts), note);
}

function curve(line, at) {
  const [path, places] = [[], []];
  let gap = true;
  for (const [x, y] of line.points) {
    if (y !== null) {
      const place = at(x, y);
      places.push(place);
      path.push(`${gap ? "M" : "L"}${place[0].toFixed(1)} ${place[1].toFixed(1)}${gap ? "h0" : ""}`);
    }
    gap = y === null;
  }
  const drawn = drawing("path", { d: path.join(""), class: `line t${line.tone % 8}`, "stroke-dasharray": DASHES[line.tone % 8] });
  return [drawn, ...(places.length <= MARKED ? places.map(([x, y]) => marker(x, y, line.tone)) : [])];
}

function marker(x, y, tone) {
  return drawing("path", { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, d: MARKS[tone % 4], class: `f${tone % 8}` });
}

// --- the page --------------------------------------------------------------------------------------------------------

function blocks(found) {
  const parts = [];
  for (const block of found) {
    const drawn = BLOCKS[block.block](block);
    const charts = parts[parts.length - 1];
    if (block.block === "chart" && charts && charts.className === "charts") charts.append(drawn);
    else parts.push(block.block === "chart" ? element("div", "charts", drawn) : drawn);
  }
  return parts;
}

function heading(page) {
  const parts = [];
  if (page.back) {
    const back = element("a", "", "All runs");
    back.href = "#";
    parts.push(element("p", "back", "‹ ", back));
  }
  const title = element("h1", "", page.title);
  title.tabIndex = -1;
  parts.push(element("p", "kind", page.kicker), title);
  for (const line of page.about) parts.push(element("p", "about words", line));
  if (page.state) {
    const why = page.state.why ? element("span", "why", page.state.why) : null;
    parts.push(element("p", "state", element("span", `tone ${page.state.tone}`, page.state.word), why));
  }
  for (const line of page.lead) parts.push(element("p", "lead", line));
  if (page.tiles.length) {
    parts.push(element("ul", "tiles", ...page.tiles.map(([big, small]) => element("li", "tile", element("b", "", big), element("span", "", small)))));
  }
  return parts;
}

function draw(page, fresh) {
  document.title = `${page.title} - fedllm dash`;
  const { sections, reading, ...first } = page;
  put("head", JSON.stringify(first), () => head.replaceChildren(...heading(page)));
  const names = new Set(sections.map((one) => `section ${one.title}`));
  for (const name of held.keys()) {
    if (name !== "head" && !names.has(name)) {
      held.get(name).node.remove();
      held.delete(name);
    }
  }
  sections.forEach((one, place) => {
    const name = `section ${one.title}`;
    put(name, JSON.stringify(one), (before) => {
      const node = element("section", "", element("h2", "", one.title), ...blocks(one.blocks));
      if (before) before.replaceWith(node);
      return node;
    });
    const node = held.get(name).node;
    if (body.children[place] !== node) body.insertBefore(node, body.children[place] || null);
  });
  if (fresh) {
    window.scrollTo(0, 0);
    if (shown !== null || held.get("head").again) head.querySelector("h1").focus({ preventScroll: true });
    held.get("head").again = true;
  }
}

function put(name, said, make) {
  const before = held.get(name);
  if (before && before.said === said) return;
  held.set(name, { said, node: make(before && before.node), again: before && before.again });
}

function say(bad, ...parts) {
  live.className = bad ? "live bad" : "live";
  live.replaceChildren(...parts.map((part) => element("span", "", part)));
}

// A hook for tests: how far the page is wider than the screen, and which page stands here.
function measure(page) {
  const root = document.documentElement;
  root.dataset.overflow = String(Math.max(0, root.scrollWidth - root.clientWidth));
  root.dataset.width = String(window.innerWidth);
  root.dataset.page = page.kind;
}

// --- asking ----------------------------------------------------------------------------------------------------------

function wanted() {
  const found = /^#run=(.+)$/.exec(window.location.hash);
  try {
    return found ? decodeURIComponent(found[1]) : null;
  } catch {
    return null;
  }
}

async function ask() {
  window.clearTimeout(timer);
  const run = wanted();
  const other = run !== shown || !heard;
  if (other) mark = "";
  let wait = POLL;
  try {
    const headers = mark ? { "If-None-Match": mark } : {};
    const place = run === null ? "/page.json" : `/page.json?run=${encodeURIComponent(run)}`;
    const answer = await fetch(place, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (run !== wanted()) return;
    if (answer.status === 401) {
      say(true, "This session is over. Open the address that fedllm dash printed when it was started last.");
      return;
    }
    if (answer.status === 404) {
      say(true, "There is no such run here any more.");
      if (other) window.location.hash = "";
    } else if (answer.ok || answer.status === 304) {
      if (answer.ok) {
        const page = await answer.json();
        if (run !== wanted()) return;
        draw(page, other);
        [mark, shown] = [answer.headers.get("ETag") || "", run];
        measure(page);
        live.dataset.reading = page.reading ? `${Math.floor((100 * page.reading[0]) / Math.max(1, page.reading[1]))}` : "";
      }
      heard = new Date();
      const reading = live.dataset.reading;
      if (reading) [wait, mark] = [50, ""];
      say(false, ...(reading ? [`Reading the files: ${reading} %`] : []), element("span", "", "As of ", moment(heard.toISOString())));
    } else {
      say(true, `The page's server answered ${answer.status}: ${(await answer.text()).slice(0, 200)}`);
    }
  } catch {
    const known = heard ? element("span", "", "What is shown was known at ", moment(heard.toISOString())) : "";
    say(true, "The page's server does not answer: is fedllm dash still running?", known);
    wait = 2 * POLL;
  }
  if (!document.hidden) timer = window.setTimeout(ask, wait);
}

window.addEventListener("hashchange", ask);
document.addEventListener("visibilitychange", () => document.hidden || ask());
ask();
