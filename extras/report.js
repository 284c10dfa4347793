"use strict";
// Words with their attention maps. The data come from report.py.
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const colors = data.colors.match(/.{6}/g).map(color => `#${color}`);  // of 256 levels

function addElement(parent, name, text = "", className = "") {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  element.className = className;
  return element;
}

function addMaps(parent, question) {
  const section = addElement(parent, "section", "", "question");
  const title = addElement(section, "p", `${question.question} (answer: ${question.truth}) `);
  const percent = Number((100 * question.scale).toPrecision(2));
  addElement(title, "span", `brightest color: ${percent} % of the attention or more`, "note");
  const figures = addElement(section, "div", "", "figures");
  addFigure(figures, question, "photo").className = "plain";
  question.answers.forEach((answer, n) => addAnswer(figures, question, answer, data.names[n]));
}

function addFigure(parent, question, caption) {  // the photo and its boxes
  const figure = addElement(parent, "figure"), [width, height] = question.size;
  addElement(figure, "figcaption", caption);
  const photo = addElement(figure, "div", "", "photo");
  photo.style.setProperty("--ratio", width / height);
  addElement(photo, "img").src = question.image;
  for (const [x1, y1, x2, y2] of question.boxes) {
    const { style } = addElement(photo, "div", "", "box");
    style.inset = [y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width]
      .map(share => `${100 * share}%`).join(" ");  // distances from the edges, clockwise
  }
  return figure;
}

function addAnswer(parent, question, answer, name) {
  const figure = addFigure(parent, question, `${name} training: `);
  const verdict = answer.correct ? "right" : "wrong";
  addElement(figure.querySelector("figcaption"), "span", verdict, verdict);
  const canvas = document.createElement("canvas");  // its colors are those of pictures.py
  figure.querySelector("img").after(canvas);
  [canvas.height, canvas.width] = answer.grid;
  const words = addElement(figure, "div", "", "words"), context = canvas.getContext("2d");
  const show = (button, [largest, levels]) => {  // a map, see pack_map in evaluate.py
    words.querySelector("[aria-current]")?.removeAttribute("aria-current");
    button.setAttribute("aria-current", true);
    [...levels].forEach((level, i) => {
      const attention = largest * (data.levels.indexOf(level) / 63) ** 2;
      context.fillStyle = colors[Math.round(255 * Math.min(1, attention / question.scale))];
      context.fillRect(i % canvas.width, Math.floor(i / canvas.width), 1, 1);
    });
  };
  const [first, last] = answer.look_maps;
  const whole = {mean: answer.mean, "first look": first, "last look": last};
  for (const [name, map] of Object.entries(whole)) {
    addWord(words, name, button => show(button, map)).classList.add("whole");
    words.append(" ");
  }
  words.append("\n");  // the words of the answer begin on a line of their own
  words.firstElementChild.tabIndex = 0;
  answer.words.forEach((word, i) => {
    if (!word.trim()) return words.append(word);  // such as the end of the turn
    const button = addWord(words, word, button => show(button, answer.maps[i]));
    button.classList.toggle("selected", answer.selected[i]);
  });
  show(words.firstElementChild, answer.mean);
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

const questions = JSON.parse(byId("questions").textContent);
questions.forEach((question, n) => addMaps(byId(n ? "maps" : "first"), question));
for (const section of document.querySelectorAll(".evaluated")) section.hidden = !questions.length;
