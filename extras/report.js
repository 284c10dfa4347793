"use strict";
// Words with their attention maps, and the list of questions. `data` comes from report.py.
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const colors = data.colors.match(/.{6}/g).map(color => `#${color}`);  // of 256 levels

function addElement(parent, name, text = "", className = "") {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  element.className = className;
  return element;
}

function addVerdict(parent, correct) {
  addElement(parent, "span", correct ? "✓ right" : "✗ wrong", correct ? "right" : "wrong");
}

// --- maps ---

function unpack([largest, levels]) {  // the attention of each cell, see pack_map in evaluate.py
  return [...levels].map(level => largest * (data.levels.indexOf(level) / 63) ** 2);
}

function fill(context, mode, color, x, y, width, height) {
  context.globalCompositeOperation = mode;
  context.fillStyle = color;
  context.fillRect(x, y, width, height);
}

function drawMap(canvas, image, question, answer, map) {  // as `overlay` in pictures.py
  const context = canvas.getContext("2d"), { width, height } = canvas, [rows, cols] = answer.grid;
  context.globalCompositeOperation = "source-over";
  context.drawImage(image, 0, 0, width, height);
  context.globalAlpha = 0.6;
  fill(context, "saturation", "black", 0, 0, width, height);  // 40 % of the color stays
  context.globalAlpha = 1;
  fill(context, "source-over", "rgba(0, 0, 0, 0.5)", 0, 0, width, height);  // darker
  map.forEach((value, i) => {
    const row = Math.floor(i / cols), col = i % cols;
    const [left, right] = [col, col + 1].map(n => Math.round(n * width / cols));
    const [top, bottom] = [row, row + 1].map(n => Math.round(n * height / rows));
    const color = colors[Math.round(255 * Math.min(1, value / question.scale))];
    fill(context, "screen", color, left, top, right - left, bottom - top);  // added like light
  });
  context.globalCompositeOperation = "source-over";
  for (const box of question.boxes) {
    const [x1, y1, x2, y2] = box.map((v, i) => v * [width, height][i % 2] / question.size[i % 2]);
    for (const [color, thickness] of [["white", 8], ["#00d5ff", 4]]) {
      context.strokeStyle = color;
      context.lineWidth = thickness;
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
  }
}

function addMaps(question, index) {
  const section = addElement(byId("maps"), "section", "", "question");
  section.id = `maps-${index}`;
  const title = addElement(section, "p", `${index + 1}. ${question.question} (${question.truth}) `);
  const scale = addElement(title, "span", "0 ", "note");
  addElement(scale, "span", "", "scale").style.background =
    `linear-gradient(90deg, ${colors.filter((_, i) => i % 15 === 0)})`;
  scale.append(` ${Number((100 * question.scale).toPrecision(2))} % or more per cell`);
  const figures = addElement(section, "div", "", "figures");
  addElement(addElement(figures, "figure", "photo"), "img").src = question.image;
  question.answers.forEach((answer, n) => addAnswer(figures, question, answer, data.names[n]));
}

function addAnswer(parent, question, answer, name) {
  const figure = addElement(parent, "figure");
  addVerdict(addElement(figure, "figcaption", `${name} training: `), answer.correct);
  const canvas = addElement(figure, "canvas"), image = new Image();
  const enlarge = 560 / Math.max(...question.size);
  [canvas.width, canvas.height] = question.size.map(v => Math.max(1, Math.round(v * enlarge)));
  const words = addElement(figure, "div", "", "words");
  const show = (button, map) => {
    words.querySelector("[aria-current]")?.removeAttribute("aria-current");
    button.setAttribute("aria-current", true);
    drawMap(canvas, image, question, answer, unpack(map));
  };
  const mean = addWord(words, "mean", button => show(button, answer.mean));
  mean.tabIndex = 0;
  words.append(" ");
  answer.words.forEach((word, i) => {
    if (!word.trim()) return words.append(word);  // such as the end of the turn
    const button = addWord(words, word, button => show(button, answer.maps[i]));
    button.classList.toggle("selected", answer.selected[i]);
  });
  image.onload = () => show(mean, answer.mean);
  image.src = question.image;
}

function addWord(parent, text, show) {
  const word = text.trim(), start = text.indexOf(word);
  parent.append(text.slice(0, start));  // spaces are not underlined
  const button = addElement(parent, "button", word, "word");
  parent.append(text.slice(start + word.length));
  button.tabIndex = -1;  // Tab moves to the next answer, the arrow keys to the next word
  for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => show(button));
  button.addEventListener("keydown", event => {
    if (event.key === "ArrowRight") button.nextElementSibling?.focus();
    if (event.key === "ArrowLeft") button.previousElementSibling?.focus();
  });
  return button;
}

// --- the list of questions ---

function addQuestion(question, index) {
  const item = addElement(byId("questions"), "li"), row = addElement(item, "div");
  item.value = index + 1;  // a filter does not renumber
  const title = addElement(row, "span", `${question.question} (${question.truth}) `);
  if (question.image) addElement(title, "a", "maps").href = `#maps-${index}`;
  question.answers.forEach((answer, n) => {
    const cell = addElement(row, "span", `${data.names[n]}: `);
    addVerdict(cell, answer.correct);
    cell.append(`: ${answer.text}`);
  });
}

function listFilters() {  // [text, does it show a question with these answers?]
  const filters = [["all questions", () => true]];
  const verdict = correct => correct ? "right" : "wrong";
  const place = look => look ? "on the region" : "off";
  const combinations = data.names.length > 1 ? [[0, 1], [1, 0], [1, 1], [0, 0]] : [[0], [1]];
  for (const values of combinations) {
    const text = data.names.map((name, n) => `${verdict(values[n])} ${name}`).join(", ");
    filters.push([text, answers => answers.every(({ correct }, n) => correct === values[n])]);
  }
  data.names.forEach((name, n) => {
    for (const [early, late] of [[1, 1], [0, 1], [1, 0], [0, 0]]) {
      const text = `${name}: first look ${place(early)}, last look ${place(late)}`;
      filters.push([text, answers => answers[n].early === early && answers[n].late === late]);
    }
  });
  return filters;
}

function addFilters() {
  const select = byId("filter"), items = [...byId("questions").children], filters = listFilters();
  for (const [text, matches] of filters) {
    const count = data.questions.filter(question => matches(question.answers)).length;
    addElement(select, "option", `${text} (${count})`);
  }
  select.addEventListener("input", () => {
    const matches = filters[select.selectedIndex][1];
    items.forEach((item, i) => { item.hidden = !matches(data.questions[i].answers); });
  });
  if (items.length < data.total)
    select.after(` the first ${items.length} of ${data.total} questions`);
}

for (const index of data.shown) addMaps(data.questions[index], index);
data.questions.forEach(addQuestion);
addFilters();
for (const section of document.querySelectorAll(".evaluated"))
  section.hidden = !data.questions.length;
