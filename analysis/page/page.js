"use strict";
(() => {
  const plot = document.getElementById("plot");
  const marks = [...plot.querySelectorAll(".mark")];
  const place = new Map(marks.map((mark) => [mark.dataset.key, mark]));
  const number = (mark, axis) => Number(mark.dataset[axis]);
  // From left to right, as the arrow keys go.
  const ordered = [...marks].sort((a, b) => number(a, "x") - number(b, "x") || number(b, "y") - number(a, "y"));
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  let chosen = null;
  function choose(mark) {
    if (!mark || mark === chosen) return;
    chosen = mark;
    const key = mark.dataset.key;
    for (const each of marks) {
      each.classList.toggle("chosen", each === mark);
      each.setAttribute("tabindex", each === mark ? "0" : "-1");
    }
    for (const bars of plot.querySelectorAll(".bars")) bars.classList.toggle("chosen", bars.dataset.of === key);
    for (const words of document.querySelectorAll("#details article")) words.hidden = words.dataset.key !== key;
    const members = mark.dataset.members.split(" ").map((member) => place.get(member)).filter(Boolean);
    document.getElementById("ties").replaceChildren(
      ...members.map((member) =>
        svg("path", { d: `M${mark.dataset.x} ${mark.dataset.y}L${member.dataset.x} ${member.dataset.y}` }),
      ),
    );
  }

  // The nearest mark within reach, so that a finger need not hit it.
  function nearest(event, reach) {
    const matrix = plot.getScreenCTM();
    if (!matrix) return null;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    const scale = matrix.a || 1;
    let best = null;
    let least = reach / scale;
    for (const mark of marks) {
      const distance = Math.hypot(number(mark, "x") - point.x, number(mark, "y") - point.y);
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  }
  plot.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") choose(nearest(event, 16));
  });
  plot.addEventListener("click", (event) => {
    const mark = nearest(event, 26);
    if (mark) mark.focus({ preventScroll: true });
    choose(mark);
  });
  plot.addEventListener("focusin", (event) => choose(event.target.closest(".mark")));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const ends = { Home: 0, End: ordered.length - 1 }[event.key];
    if (step === undefined && ends === undefined) return;
    event.preventDefault();
    const next = ends ?? (ordered.indexOf(chosen) + step + ordered.length) % ordered.length;
    ordered[next].focus();
  });
  choose(marks.find((mark) => mark.getAttribute("tabindex") === "0"));

  // Settings of the models: numbers by colour and size, words by colour and shape.
  const settings = JSON.parse(document.getElementById("settings").textContent);
  const shade = document.getElementById("shade");
  const ramp = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const kinds = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"];
  const shapes = ["M-6 -6H6V6H-6Z", "M0 -7L7 5H-7Z", "M0 -8L8 0L0 8L-8 0Z", "M0 7L7 -5H-7Z", "M-7 -2H7V2H-7Z", "M-2 -7H2V7H-2Z"];
  function ramped(share) {
    const at = Math.min(share * (ramp.length - 1), ramp.length - 1.001);
    const [low, high] = [ramp[Math.floor(at)], ramp[Math.floor(at) + 1]];
    return `rgb(${low.map((value, i) => Math.round(value + (at % 1) * (high[i] - value))).join(" ")})`;
  }
  function looks(values) {
    const numbers = Object.values(values).map(Number);
    if (numbers.some((value) => !Number.isFinite(value))) {
      const words = [...new Set(Object.values(values))].sort();
      const of = (word) => words.indexOf(word) % kinds.length;
      const look = (word) => ({ fill: kinds[of(word)], d: shapes[of(word)], scale: 1 });
      return { look, shown: words };
    }
    const [least, most] = [Math.min(...numbers), Math.max(...numbers)];
    const bent = least > 0 && most / least > 20 ? Math.log : (value) => value;
    const look = (word) => {
      const share = (bent(Number(word)) - bent(least)) / (bent(most) - bent(least));
      return { fill: ramped(share), d: null, scale: 0.75 + 0.75 * share };
    };
    return { look, shown: [String(least), String(most)] };
  }
  const own = new Map();
  for (const mark of marks.filter((each) => each.classList.contains("individual"))) {
    const path = mark.querySelector("path");
    own.set(mark, { path, d: path.getAttribute("d"), fill: path.style.fill });
  }
  shade?.addEventListener("change", () => {
    const values = settings[shade.value];
    const found = values && looks(values);
    for (const [mark, { path, d, fill }] of own) {
      const word = values?.[mark.dataset.key];
      const look = word === undefined ? { fill: values ? "none" : fill, d: null, scale: 1 } : found.look(word);
      path.style.fill = look.fill;
      path.setAttribute("d", look.d ?? d);
      path.setAttribute("transform", `scale(${look.scale})`);
      mark.classList.toggle("mixture", Boolean(values)); // an edge in ink
    }
    const d = own.values().next().value.d;
    document.getElementById("shades").replaceChildren(
      ...(found ? found.shown : []).map((word) => {
        const look = found.look(word);
        const line = document.createElement("span");
        const glyph = svg("svg", { viewBox: "-11 -11 22 22", "aria-hidden": "true" });
        glyph.append(svg("path", { d: look.d ?? d, transform: `scale(${look.scale})`, fill: look.fill, stroke: "currentColor" }));
        const short = Number.isFinite(Number(word)) ? String(Number(Number(word).toPrecision(3))) : word;
        line.append(glyph, short);
        return line;
      }),
    );
  });

  // Heads that sort.
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        table.querySelectorAll("thead th").forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const word = (line) => line.cells[column].querySelector("data")?.value ?? line.cells[column].textContent;
        const compare = (a, b) => {
          const [one, two] = [word(a), word(b)];
          if (!one || !two) return !one - !two; // what is empty comes last
          const gap = Number(one) - Number(two);
          return (Number.isNaN(gap) ? one.localeCompare(two) : gap) * (down ? -1 : 1);
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
      });
    });
  }
})();
