"use strict";
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const source = byId("source"), range = byId("range"), box = byId("box"), sinks = byId("sinks"),
  smooth = byId("smooth");
const names = ["before", "after"], answers = [], sections = [];
const colorMap = data.inferno.split(" ").map(point => point.match(/../g).map(v => parseInt(v, 16)));
const levelOf = Object.fromEntries([...data.levels].map((c, i) => [c, i / 63]));
const looks = {  // early and late
  "1,1": "looked at the region early and late",
  "0,1": "looked elsewhere early, but corrected itself late",
  "1,0": "looked at the region early, but elsewhere late",
  "0,0": "looked elsewhere early and late",
};
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const milliseconds = 700;  // per word, when an answer is played
let lookFilter = null;  // { result, early, late }

// --- maps ---

function decode([largest, cells]) {  // the attention of each cell, see pack_map
  return [...cells].map(c => largest * levelOf[c] ** 2);
}

function decodeOne([largest, text], n, cells) {  // map n of several, see pack_maps
  const [scale, ...map] = text.slice(n * (cells + 1), (n + 1) * (cells + 1));
  return decode([largest * levelOf[scale] ** 2, map]);
}

function resample(values, [rows, cols], [newRows, newCols]) {  // as in html_report.resample
  const center = (i, length, newLength) => Math.floor((2 * i + 1) * length / (2 * newLength));
  return Array.from({ length: newRows * newCols }, (_, i) => values[
    center(Math.floor(i / newCols), rows, newRows) * cols + center(i % newCols, cols, newCols)]);
}

function headMap(result, head, word) {  // heads without a map per word show their mean map
  const { grid, kept, maps, mean } = result.heads, n = kept.indexOf(head), own = n >= 0;
  const values = decodeOne(own ? maps[word] : mean, own ? n : head, grid[0] * grid[1]);
  return { grid, values, own };
}

function subtracts(answer) {
  return sinks.checked && source.value === "reward" && answer.head === null && answer.result.mean;
}

function mapOf(answer, word) {  // { grid, values } of the map in view
  const { result, head } = answer;
  if (head !== null) return headMap(result, head, word);
  if (source.value === "reward" && result.rewarded) {
    const { grid, maps } = result.rewarded, values = decode(maps[word]);
    if (!subtracts(answer)) return { grid, values };
    const usual = resample(decode(result.mean.map), result.mean.grid, grid);
    return { grid, values: values.map((v, i) => Math.max(0, v - usual[i])) };
  }
  return { grid: result.grid, values: decode(result.maps[storedLayer(result)][word]) };
}

function storedLayer(result) {  // long answers have fewer layers: the nearest one is shown
  const { layers } = result, wanted = source.value === "reward" ? Infinity : +source.value;
  const distance = layer => Math.abs(layer - wanted);
  return layers.reduce((best, layer, i) => distance(layer) <= distance(layers[best]) ? i : best, 0);
}

function nameOfMap(answer) {
  const { result, head } = answer;
  if (head !== null) return headName(result, head);
  if (source.value === "reward" && result.rewarded) return `the reward's ${data.rewarded}`;
  return `layer ${result.layers[storedLayer(result)]}`;
}

function headName(result, head) {
  const heads = result.heads.count[1];
  return `layer ${Math.floor(head / heads)}, head ${head % heads}`;
}

const percent = value => `${+(100 * value).toPrecision(2)}\u00a0%`;
const brightest = values => range.value > 0 ? fixedMaximum() : Math.max(...values, 1e-12);
const fixedMaximum = () => largestStored * (range.value / 100) ** 2;
const storedMaps = result => [...result.maps.flat(), ...(result.rewarded || { maps: [] }).maps];
const largestStored = Math.max(1e-5, ...data.examples.flatMap(
  example => example.results.flatMap(result => storedMaps(result).map(([largest]) => largest))));

// --- drawing ---

function color(level) {  // 0 to 1
  const t = level * (colorMap.length - 1), i = Math.min(Math.floor(t), colorMap.length - 2);
  return colorMap[i].map((v, k) => Math.round(v + (colorMap[i + 1][k] - v) * (t - i)));
}

function cellEdges(i, count, length) { return [i, i + 1].map(v => Math.round(v * length / count)); }

function drawCells(context, { grid, values }, [x, y, width, height], alpha) {
  const [rows, cols] = grid, top = brightest(values);
  values.forEach((value, i) => {
    const level = Math.min(1, Math.sqrt(value / top));
    const [left, right] = cellEdges(i % cols, cols, width);
    const [up, down] = cellEdges(Math.floor(i / cols), rows, height);
    context.fillStyle = `rgba(${color(level)}, ${alpha(level)})`;
    context.fillRect(x + left, y + up, right - left, down - up);
  });
}

function drawSmooth(context, map, [x, y, width, height], alpha) {
  const small = document.createElement("canvas"), [rows, cols] = map.grid;
  [small.width, small.height] = [cols, rows];  // a pixel per cell, which the browser interpolates
  drawCells(small.getContext("2d"), map, [0, 0, cols, rows], alpha);
  context.imageSmoothingEnabled = true;
  context.drawImage(small, x, y, width, height);
}

function outline(context, x, y, width, height, thickness = 3) {
  for (const [lineColor, lineWidth] of [["black", thickness + 2], ["white", thickness]]) {
    context.strokeStyle = lineColor; context.lineWidth = lineWidth;
    context.strokeRect(x, y, width, height);
  }
}

function drawBoxes(context, example, [x, y, width, height], thickness) {
  const scale = [width / example.size[0], height / example.size[1]];
  for (const [x1, y1, x2, y2] of example.boxes)
    outline(context, x + x1 * scale[0], y + y1 * scale[1], (x2 - x1) * scale[0],
            (y2 - y1) * scale[1], thickness);
}

function draw(answer) {
  const { canvas, image, example, current } = answer, context = canvas.getContext("2d");
  const map = mapOf(answer, current), area = [0, 0, canvas.width, canvas.height];
  context.imageSmoothingEnabled = example.size[0] > 200;
  context.drawImage(image, ...area);
  context.fillStyle = "rgba(0, 0, 0, 0.35)";  // a darker image, on which bright cells stand out
  context.fillRect(...area);
  (smooth.checked ? drawSmooth : drawCells)(context, map, area, level => 0.85 * level);
  if (box.checked) drawBoxes(context, example, area);
  if (answer.cell !== null) {
    const [rows, cols] = map.grid;
    const [left, right] = cellEdges(answer.cell % cols, cols, canvas.width);
    const [up, down] = cellEdges(Math.floor(answer.cell / cols), rows, canvas.height);
    context.setLineDash([6, 4]);
    outline(context, left, up, right - left, down - up);
    context.setLineDash([]);
  }
  drawWords(answer);
  answer.note.textContent = describe(answer, map);
  if (answer.details && answer.details.open) drawHeads(answer);
}

function drawWords(answer) {
  const { result, tokens, current, pinned, cell } = answer;
  const shares = cell === null ? null : tokens.map((_, i) => mapOf(answer, i).values[cell]);
  const most = shares && Math.max(...shares, 1e-12);
  tokens.forEach((token, i) => {
    const [hue, strength] = shares ? ["cell", 0.8 * shares[i] / most]
      : ["entropy", Math.min(0.6, result.entropy[i] / 2)];
    token.style.background = `rgba(var(--${hue}), ${strength})`;
    token.setAttribute("aria-current", i === current);
    token.setAttribute("aria-pressed", i === pinned);
    token.tabIndex = i === current ? 0 : -1;
  });
}

function describe(answer, map) {  // the line below the words
  const { result, current, pinned, cell } = answer, word = i => `"${result.words[i].trim()}"`;
  const parts = [`${word(current)}${pinned === null ? "" : " (pinned)"}: ` +
    `entropy ${result.entropy[current].toFixed(2)} nats`,
    `brightest cell: ${percent(Math.max(...map.values))} of attention` +
    (subtracts(answer) ? " above the mean map" : ""), nameOfMap(answer)];
  if (map.own === false) parts.push("mean over the underlined words");
  if (cell !== null) {
    const shares = result.words.map((_, i) => mapOf(answer, i).values[cell]);
    const best = shares.indexOf(Math.max(...shares)), cols = map.grid[1];
    parts.push(`row ${Math.floor(cell / cols) + 1}, column ${cell % cols + 1}: ` +
      `${word(best)} looked there most, ${percent(shares[best])}`);
  }
  return parts.join("; ");
}

// --- the grid of heads ---

function headLayout({ result, order, example }) {  // which head is where
  const [layers, heads] = result.heads.count, auroc = result.heads.auroc;
  const width = Math.max(16, Math.min(80, Math.floor(560 / heads) - 3));
  const height = Math.max(8, Math.round(width * example.size[1] / example.size[0]));
  const indices = [...Array(layers * heads).keys()];
  if (order.value === "auroc") indices.sort((a, b) => auroc[b] - auroc[a]);
  const place = n => [n % heads * (width + 3), Math.floor(n / heads) * (height + 7)];
  const size = [heads * (width + 3), layers * (height + 7)];
  return { indices, width, height, heads, place, size };
}

function drawHeads(answer) {
  const { headCanvas, result, example, current, head } = answer, layout = headLayout(answer);
  const context = headCanvas.getContext("2d"), { width, height } = layout;
  [headCanvas.width, headCanvas.height] = layout.size;  // this also clears it
  const style = getComputedStyle(document.body);
  layout.indices.forEach((index, n) => {
    const [x, y] = layout.place(n), area = [x + 1, y + 1, width, height];
    const map = headMap(result, index, current);
    context.globalAlpha = map.own ? 1 : 0.4;
    context.fillStyle = "black";
    context.fillRect(...area);
    drawCells(context, map, area, () => 1);
    if (box.checked) drawBoxes(context, example, area, 1);
    context.globalAlpha = 1;
    context.fillStyle = style.color;
    const auroc = result.heads.auroc ? result.heads.auroc[index] : 0.5;
    context.fillRect(x + 1, y + height + 2, Math.round(width * Math.max(0, 2 * auroc - 1)), 3);
    if (index === head) {
      context.lineWidth = 2;
      context.strokeStyle = style.color;
      context.strokeRect(x + 1, y + 1, width, height + 4);
    }
  });
  const { auroc } = result.heads, best = auroc ? auroc.indexOf(Math.max(...auroc)) : 0;
  describeHead(answer, head === null ? best : head);
}

function describeHead(answer, head) {  // the line below the grid of heads
  const { kept, auroc } = answer.result.heads, all = headLayout(answer).indices.length;
  const large = head === answer.head ? ", shown large" : "";
  answer.headNote.textContent = headName(answer.result, head) +
    (auroc ? `: AUROC ${auroc[head].toFixed(2)}` : "") + large;
  if (kept.length < all)
    answer.headNote.textContent += `. Only the ${kept.length} of ${all} heads with the highest ` +
      "AUROC have a map per word; the others, faint, show their mean over the underlined words";
}

function chooseHead(answer, head) {
  answer.head = head;
  answer.cell = null;  // a head can have a coarser grid
  draw(answer);
}

function addHeads(figure, answer) {
  const { result } = answer, details = addElement(figure, "details");
  addElement(details, "summary", "all layers and heads");
  addElement(details, "p", "The map of the current word in every head: a row per layer, or all " +
    "heads from the best to the worst. The bar is the AUROC of the head's mean map over the " +
    "underlined words: empty at 0.5 (chance), full at 1. Click a head, or choose one with the " +
    "arrow keys, to show it large.", "note");
  const label = addElement(details, "label", "order "), order = addElement(label, "select");
  addOption(order, "layer", "by layer");
  if (result.heads.auroc) addOption(order, "auroc", "by AUROC");
  const canvas = addElement(details, "canvas", "", "heads");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "heads: the arrow keys choose one, Escape releases it");
  const headNote = addElement(details, "p", "", "note");
  headNote.setAttribute("role", "status");
  Object.assign(answer, { details, order, headCanvas: canvas, headNote });
  details.addEventListener("toggle", () => draw(answer));
  order.addEventListener("input", () => draw(answer));
  const headAt = event => {
    const { indices, heads } = headLayout(answer);
    return indices[cellAt(event, canvas, [indices.length / heads, heads])];
  };
  canvas.addEventListener("mousemove", event => describeHead(answer, headAt(event)));
  canvas.addEventListener("mouseleave", () => drawHeads(answer));
  canvas.addEventListener("click", event => {
    const head = headAt(event);
    chooseHead(answer, head === answer.head ? null : head);
  });
  addArrows(canvas, () => {
    const { indices, heads } = headLayout(answer), rows = indices.length / heads;
    return [[rows, heads], indices.indexOf(answer.head), n => chooseHead(answer, indices[n])];
  });
}

// --- choosing with mouse and keyboard ---

function cellAt(event, canvas, [rows, cols]) {
  const part = (offset, length, count) =>
    Math.max(0, Math.min(count - 1, Math.floor(offset / length * count)));
  return part(event.offsetY, canvas.clientHeight, rows) * cols +
    part(event.offsetX, canvas.clientWidth, cols);
}

function addArrows(element, state) {  // state(): [grid, chosen cell or -1, a function to choose]
  element.addEventListener("keydown", event => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [[rows, cols], cell, choose] = state();
    const row = Math.floor(cell / cols) + move[0], col = cell % cols + move[1];
    if (cell < 0) choose(0);
    else if (row >= 0 && row < rows && col >= 0 && col < cols) choose(row * cols + col);
  });
}

function chooseCell(answer, cell) {
  answer.cell = cell;
  draw(answer);
}

function pin(answer, word) {
  stop(answer.section);
  answer.pinned = answer.pinned === word ? null : word;
  answer.current = word;
  draw(answer);
}

function addToken(parent, answer, i) {
  const { result, tokens } = answer;
  const className = "token" + (result.selected[i] ? " selected" : "");
  const token = addElement(parent, "span", result.words[i], className);
  parent.append(" ");
  token.setAttribute("role", "button");
  const select = () => {
    if (answer.pinned !== null || answer.section.timer || answer.current === i) return;
    answer.current = i;
    draw(answer);
  };
  for (const event of ["mousemove", "focus"]) token.addEventListener(event, select);
  token.addEventListener("click", () => pin(answer, i));
  token.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(answer, i); }
    if (step && tokens[i + step]) { event.preventDefault(); tokens[i + step].focus(); }
  });
  tokens.push(token);
}

// --- playing the answers ---

function step(section) {  // show the next word of both answers
  const last = Math.max(...section.answers.map(answer => answer.tokens.length)) - 1;
  section.word = section.word >= last ? 0 : section.word + 1;
  for (const answer of section.answers) {
    answer.pinned = null;
    answer.current = Math.min(section.word, answer.tokens.length - 1);
    draw(answer);
  }
  if (section.word === last) stop(section);
}

function stop(section) {
  clearInterval(section.timer);
  section.timer = null;
  section.play.textContent = calm ? "next word" : "play";
}

function play(section) {
  if (section.timer) return stop(section);
  if (!calm) {  // with reduced motion, every click shows one word
    section.word = -1;
    section.timer = setInterval(step, milliseconds, section);
    section.play.textContent = "pause";
  }
  step(section);
}

// --- building the page ---

function addElement(parent, name, text, className) {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text || "";
  element.className = className || "";
  return element;
}

function addOption(select, value, text) {
  addElement(select, "option", text).value = value;
}

function addVerdict(parent, correct) {
  addElement(parent, "span", correct ? "✓ right" : "✗ wrong", correct ? "right" : "wrong");
}

function addAnswer(section, parent, example, result, n) {
  const figure = addElement(parent, "figure"), caption = addElement(figure, "figcaption");
  addElement(caption, "span", `${names[n]}, `);
  addVerdict(caption, result.correct);
  const look = looks[[result.early, result.late]];
  if (look) addElement(caption, "span", `, ${look}`);
  const canvas = addElement(figure, "canvas", "", "image"), words = addElement(figure, "div");
  const scale = 448 / Math.max(...example.size), image = new Image();
  [canvas.width, canvas.height] = example.size.map(v => Math.round(v * scale));
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `image and attention, ${names[n]}: the arrow keys choose a ` +
    "cell, Escape releases it");
  const current = initialWord(result);  // the word whose map is drawn
  const answer = { canvas, image, example, result, section, tokens: [], current, pinned: null,
                   cell: null, head: null, details: null };
  result.words.forEach((_, i) => addToken(words, answer, i));
  answer.note = addElement(words, "p", "", "note");
  if (result.heads) addHeads(figure, answer);
  canvas.addEventListener("click", event => {
    const cell = cellAt(event, canvas, mapOf(answer, answer.current).grid);
    chooseCell(answer, cell === answer.cell ? null : cell);
  });
  addArrows(canvas, () => [mapOf(answer, answer.current).grid,
    answer.cell === null ? -1 : answer.cell, cell => chooseCell(answer, cell)]);
  section.answers.push(answer);
  answers.push(answer);
  image.onload = () => draw(answer);
  image.src = example.image;
}

function initialWord(result) {  // the underlined word with the most attention to one cell
  const { maps } = result.rewarded || { maps: result.maps[result.maps.length - 1] };
  const most = maps.map(([largest], i) => result.selected[i] ? largest : -1);
  return most.indexOf(Math.max(...most));
}

function addExample(example) {
  const element = addElement(byId("examples"), "section", "", "example");
  element.id = `example-${example.index}`;
  const title = addElement(element, "p", `${example.question} (${example.answer}) `);
  const section = { element, index: example.index, answers: [], word: -1, timer: null };
  section.play = addElement(title, "button", "", "play");
  section.play.addEventListener("click", () => play(section));
  stop(section);
  example.results.forEach((result, n) => addAnswer(section, element, example, result, n));
  sections.push(section);
}

function addQuestion([question, truth, results], index) {
  const item = addElement(byId("questions"), "li"), row = addElement(item, "div");
  item.value = index + 1;  // filters do not renumber
  const title = addElement(row, "span", question + (truth ? ` (${truth}) ` : " "));
  if (data.examples.some(example => example.index === index))
    addElement(title, "a", "maps").href = `#example-${index}`;
  results.forEach(([text, correct, early, late], n) => {
    const cell = addElement(row, "span", `${names[n]}: `);
    addVerdict(cell, correct);
    if (looks[[early, late]]) cell.append(`, ${looks[[early, late]]}`);
    cell.append(`: ${text}`);
  });
}

function matches(index) {
  const results = data.questions[index][2], verdict = byId("verdict").value;
  if (verdict && results.map(result => +!!result[1]).join("") !== verdict) return false;
  if (!lookFilter) return true;
  const [, , early, late] = results[lookFilter.result];
  return early === lookFilter.early && late === lookFilter.late;
}

function filter() {
  const items = [...byId("questions").children];
  items.forEach((item, i) => { item.hidden = !matches(i); });
  for (const section of sections) section.element.hidden = !matches(section.index);
  const shown = items.filter(item => !item.hidden).length;
  const open = sections.filter(section => !section.element.hidden).length;
  const first = items.length < data.total ? `the first ${items.length} of ` : "";
  byId("count").textContent = `${shown} of ${first}${data.total} questions, ${open} with maps`;
  for (const button of document.querySelectorAll(".look"))
    button.setAttribute("aria-pressed", lookOf(button) === JSON.stringify(lookFilter));
}

const lookOf = button => JSON.stringify(  // the filter of a cell of the 2 x 2
  { result: +button.dataset.result, early: +button.dataset.early, late: +button.dataset.late });

function addFilters() {
  const verdict = byId("verdict"), words = { 1: "right", 0: "wrong" };
  const codes = data.questions[0][2].length === 1 ? ["1", "0"] : ["11", "01", "10", "00"];
  addOption(verdict, "", "all");
  for (const code of codes)
    addOption(verdict, code, [...code].map((c, n) => `${words[c]} ${names[n]}`).join(", "));
  verdict.addEventListener("input", filter);
  for (const button of document.querySelectorAll(".look"))
    button.addEventListener("click", () => {
      const same = lookOf(button) === JSON.stringify(lookFilter);
      lookFilter = same ? null : JSON.parse(lookOf(button));
      filter();
      if (lookFilter) byId("held-out").scrollIntoView();
    });
  byId("show-all").addEventListener("click", () => {
    lookFilter = null;
    verdict.value = "";
    filter();
  });
}

function addSources() {
  const results = answers.map(answer => answer.result);
  const layers = [...new Set(results.flatMap(result => result.layers))].sort((a, b) => a - b);
  for (const layer of layers) addOption(source, layer, `layer ${layer}, mean over heads`);
  const rewarded = results.some(result => result.rewarded);
  if (rewarded) addOption(source, "reward", `the reward's ${data.rewarded}`);
  source.value = rewarded ? "reward" : layers[layers.length - 1];
}

function drawAll() {
  const known = source.value === "reward" && answers.some(answer => answer.result.mean);
  sinks.disabled = !known;
  byId("sinks-text").hidden = !sinks.checked;
  byId("sinks-text").textContent = known ?
    `The mean map of all ${data.total} held-out questions is what the model looks at whatever is ` +
    "asked: attention sinks, often at the border. What remains is attention due to this question " +
    "and word. Cells below the mean are empty." :
    "The mean map of all held-out questions is stored only for the map of the reward.";
  byId("range-text").textContent =
    range.value > 0 ? percent(fixedMaximum()) : "the maximum of each map";
  answers.forEach(draw);
}

function describeLimits() {
  const withHeads = data.examples.filter(example => example.results[0].heads).length;
  byId("map-limits").textContent = `Maps are stored for the first ${data.examples.length} of ` +
    `${data.total} questions, and for single heads for the first ${withHeads}. Long answers and ` +
    "large models get coarser maps, fewer layers and fewer heads, so that this page stays small.";
}

function release() {
  sections.forEach(stop);
  for (const answer of answers) Object.assign(answer, { pinned: null, cell: null, head: null });
  drawAll();
}

byId("looks").hidden = !document.querySelector(".look");
byId("held-out").hidden = !data.questions.length;
byId("maps").hidden = !data.examples.length;
data.examples.forEach(addExample);
data.questions.forEach(addQuestion);
if (data.questions.length) {
  addFilters();
  filter();
}
if (data.examples.length) {
  addSources();
  describeLimits();
  source.addEventListener("input", () => {
    for (const answer of answers) answer.cell = null;  // the grids differ
    drawAll();
  });
  for (const control of [range, box, sinks, smooth]) control.addEventListener("input", drawAll);
  document.addEventListener("keydown", event => { if (event.key === "Escape") release(); });
  drawAll();
}
