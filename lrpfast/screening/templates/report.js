// Draws the plots as SVG. No library: a scatter with hover and zoom is all there is.
(() => {
  "use strict";
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const colours = ["#3b6fb6", "#e08a2e", "#4a9d5b", "#8a63b5", "#a8743f", "#d56aa0", "#5f6b7a", "#a3a636", "#3aa6b0", "#b34d4d", "#6f7fd1", "#2f6f5e"];
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  function element(name, attributes, parent) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }
  function tell(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - wide - 8) + "px";
    tip.style.top = (event.clientY + high + 22 > innerHeight ? event.clientY - high - 10 : event.clientY + 14) + "px";
  }
  function hush() { tip.hidden = true; }

  // The view is a rectangle of the unit square: {x, y, side}. Points keep their size on the screen whatever the zoom.
  function scatter(box, data) {
    const width = 560, height = 440, margin = 14;
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "scatter of the class" }, box);
    const view = { x: 0, y: 0, side: 1 };
    const order = data.x.map((_, i) => i).sort((a, b) => (data.group[a] < 0 ? 0 : 1) - (data.group[b] < 0 ? 0 : 1));
    const marks = order.map((i) => {
      const inGroup = data.group[i] >= 0, colour = colours[data.cluster[i] % colours.length];
      const mark = element("circle", { r: inGroup ? 5 : 3, fill: colour, "fill-opacity": inGroup ? 1 : 0.45, stroke: data.group[i] === 0 ? "#c62828" : inGroup ? "#1c2330" : "none", "stroke-width": 2 }, svg);
      mark.addEventListener("pointermove", (event) => tell(event, [data.name[i], `predicted: ${data.prediction[i]}`, `cluster ${data.cluster[i] + 1}` + (inGroup ? `, group ${data.numbers[data.group[i]]}` : ""), `${Math.round(100 * data.score[i])}% as clear as a typical image of the farthest group`].join("\n")));
      mark.addEventListener("pointerleave", hush);
      return [mark, data.x[i], data.y[i]];
    });
    const inner = [width - 2 * margin, height - 2 * margin];
    function draw() {
      for (const [mark, x, y] of marks) {
        mark.setAttribute("cx", margin + ((x - view.x) / view.side) * inner[0]);
        mark.setAttribute("cy", margin + ((y - view.y) / view.side) * inner[1]);
      }
      svg.dataset.side = view.side;
    }
    function at(event) {
      const frame = svg.getBoundingClientRect();
      return [((event.clientX - frame.left) / frame.width * width - margin) / inner[0], ((event.clientY - frame.top) / frame.height * height - margin) / inner[1]];
    }
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [u, v] = at(event), side = Math.min(1.5, Math.max(0.02, view.side * Math.exp(event.deltaY * 0.0015)));
      view.x += u * (view.side - side);
      view.y += v * (view.side - side);
      view.side = side;
      draw();
    }, { passive: false });
    let from = null;
    svg.addEventListener("pointerdown", (event) => { from = [at(event), view.x, view.y]; });
    svg.addEventListener("pointermove", (event) => {
      if (!from || !(event.buttons & 1)) return;
      const [u, v] = at(event);
      view.x = from[1] - (u - from[0][0]) * view.side;
      view.y = from[2] - (v - from[0][1]) * view.side;
      draw();
    });
    addEventListener("pointerup", () => { from = null; });
    svg.addEventListener("dblclick", () => { view.x = view.y = 0; view.side = 1; draw(); });
    draw();
  }

  function spectrum(box, data) {
    const width = 430, height = 440, left = 52, right = 16, top = 18, bottom = 40;
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "eigenvalues" }, box);
    const values = data.eigenvalues, most = Math.max(...values, 1e-6) * 1.05;
    const x = (i) => left + ((i + 0.5) / values.length) * (width - left - right);
    const y = (value) => height - bottom - (value / most) * (height - top - bottom);
    const write = (text, attributes) => { element("text", { "font-size": 12, fill: "#5d6675", ...attributes }, svg).textContent = text; };
    for (let step = 0; step <= 4; step += 1) {
      const value = (most * step) / 4;
      element("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "#dfe3e8" }, svg);
      write(value.toFixed(2), { x: left - 7, y: y(value) + 4, "text-anchor": "end" });
    }
    const k = data.clusters;
    if (k < values.length) {
      const middle = (x(k - 1) + x(k)) / 2;
      element("line", { x1: middle, x2: middle, y1: top, y2: height - bottom, stroke: "#c62828", "stroke-dasharray": "4 4" }, svg);
      write("gap", { x: middle + 5, y: top + 10, fill: "#c62828" });
    }
    values.forEach((value, i) => {
      const mark = element("circle", { cx: x(i), cy: y(value), r: 5, fill: i < k ? "#3b6fb6" : "#9aa3af" }, svg);
      mark.addEventListener("pointermove", (event) => tell(event, `λ${i + 1} = ${value}`));
      mark.addEventListener("pointerleave", hush);
      write(i + 1, { x: x(i), y: height - bottom + 18, "text-anchor": "middle" });
    });
    write("number of the eigenvalue", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" });
  }

  // Drawn when they come into sight: a report of twenty classes has thousands of points.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      const data = plots[Number(entry.target.dataset.plot)];
      (entry.target.classList.contains("scatter") ? scatter : spectrum)(entry.target, data);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot").forEach((box) => watch.observe(box));
})();
