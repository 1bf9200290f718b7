"use strict";
(() => {
  const plot = document.getElementById("plot");
  const marks = [...plot.querySelectorAll(".mark")];
  const place = new Map(marks.map((mark) => [mark.dataset.key, mark]));
  const at = (mark) => [mark.cx.baseVal.value, mark.cy.baseVal.value];
  const ordered = [...marks].sort((a, b) => at(a)[0] - at(b)[0] || at(b)[1] - at(a)[1]); // as the arrow keys go
  let chosen = null;
  function choose(mark) {
    if (!mark || mark === chosen) return;
    chosen = mark;
    for (const each of marks) {
      each.classList.toggle("chosen", each === mark);
      each.setAttribute("tabindex", each === mark ? "0" : "-1");
    }
    for (const words of document.querySelectorAll("#details article")) words.hidden = words.dataset.key !== mark.dataset.key;
    const members = mark.dataset.members.split(" ").map((member) => place.get(member)).filter(Boolean);
    document.getElementById("ties").replaceChildren(
      ...members.map((member) => {
        const tie = document.createElementNS("http://www.w3.org/2000/svg", "path");
        tie.setAttribute("d", `M${at(mark)}L${at(member)}`);
        return tie;
      }),
    );
  }
  // The nearest mark within reach, so that a finger need not hit it.
  function nearest(event, reach) {
    const matrix = plot.getScreenCTM();
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    const far = (mark) => Math.hypot(at(mark)[0] - point.x, at(mark)[1] - point.y);
    const best = marks.reduce((a, b) => (far(b) < far(a) ? b : a));
    return far(best) < reach / matrix.a ? best : null;
  }
  plot.addEventListener("pointermove", (event) => event.pointerType === "mouse" && choose(nearest(event, 16)));
  plot.addEventListener("click", (event) => nearest(event, 26)?.focus({ preventScroll: true }));
  plot.addEventListener("focusin", (event) => choose(event.target.closest(".mark")));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const end = { Home: 0, End: ordered.length - 1 }[event.key];
    if (step === undefined && end === undefined) return;
    event.preventDefault();
    ordered[end ?? (ordered.indexOf(chosen) + step + ordered.length) % ordered.length].focus();
  });
  choose(marks.find((mark) => mark.getAttribute("tabindex") === "0"));

  // Models by a setting: numbers from dark to light, words by colour.
  const settings = JSON.parse(document.getElementById("settings").textContent);
  const kinds = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"];
  document.getElementById("shade")?.addEventListener("change", (event) => {
    const values = settings[event.target.value] ?? {};
    const words = [...new Set(Object.values(values))];
    const isNumber = words.every((word) => Number.isFinite(Number(word)));
    words.sort(isNumber ? (a, b) => a - b : undefined);
    const colour = (word) =>
      isNumber ? `hsl(${280 - (230 * words.indexOf(word)) / Math.max(words.length - 1, 1)} 75% 45%)` : kinds[words.indexOf(word) % kinds.length];
    for (const mark of marks) mark.style.fill = mark.dataset.key in values ? colour(values[mark.dataset.key]) : "";
    const shown = isNumber && words.length > 6 ? [words[0], words[words.length >> 1], words.at(-1)] : words;
    document.getElementById("shades").replaceChildren(
      ...shown.map((word) => {
        const key = Object.assign(document.createElement("span"), { textContent: isNumber ? Number(Number(word).toPrecision(3)) : word });
        key.style.setProperty("--colour", colour(word));
        return key;
      }),
    );
  });

  // Heads that sort.
  document.querySelectorAll("table.sortable thead th").forEach((head, column, heads) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const body = head.closest("table").tBodies[0];
      const word = (line) => line.cells[column].querySelector("data")?.value ?? line.cells[column].textContent;
      const compare = (a, b) => {
        const [one, two] = [word(a), word(b)];
        if (!one || !two) return !one - !two; // what is empty comes last
        return sign * (one - two || one.localeCompare(two, undefined, { numeric: true }));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
})();
