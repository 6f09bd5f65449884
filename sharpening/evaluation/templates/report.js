"use strict";
// `scores[metric][model][image]` is a reward, or null where an image has none; the first model is the base.
const { models, metrics, trainedOn, prompts, promptOf, scores, images, seed } = JSON.parse(
  document.getElementById("data").textContent,
);
const PAGE = 24; // rows of the gallery, and of the table by prompt, that are made at once

const find = (id) => document.getElementById(id);
const modelColour = (model) => `--model-${model && 1 + ((model - 1) % 5)}`;

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// The numbers of a metric have one number of decimals: three digits of the range that its scores span.
const decimals = scores.map((ofModels) => {
  const [low, high] = extent(ofModels.flat().filter((value) => value !== null));
  return Math.min(Math.max(2 - Math.floor(Math.log10(high - low || Math.abs(high) || 1)), 0), 6);
});
const number = (value, metric) => (value === null ? "none" : value.toFixed(decimals[metric]).replace("-", "−"));
const signed = (value, metric) => (value > 0 ? "+" : "") + number(value, metric);
const direction = (value, metric) => {
  const digits = value === null ? 0 : Number(value.toFixed(decimals[metric])); // no colour for what is shown as 0
  return digits > 0 ? "up" : digits < 0 ? "down" : "";
};

function gain(metric, model, image) {
  const [ours, base] = [scores[metric][model][image], scores[metric][0][image]];
  return ours === null || base === null ? null : ours - base;
}

// Gains by prompt ------------------------------------------------------------------------------------------------

function gainsByPrompt(metric) {
  const rows = prompts.map((prompt) => ({ prompt, count: 0, sums: models.map(() => 0), known: models.map(() => 0) }));
  promptOf.forEach((index, image) => {
    rows[index].count += 1;
    for (let model = 1; model < models.length; model++) {
      const value = gain(metric, model, image);
      if (value === null) continue;
      rows[index].sums[model] += value;
      rows[index].known[model] += 1;
    }
  });
  for (const row of rows) row.gains = row.sums.map((sum, model) => (row.known[model] ? sum / row.known[model] : null));
  return rows;
}

// Ascending by a number of each item; what has none comes last, whichever way.
function sortedBy(items, number, descending) {
  const sign = descending ? -1 : 1;
  const keyed = items.map((item) => [number(item), item]);
  keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b));
  return keyed.map(([, item]) => item);
}

function showByPrompt() {
  const select = find("by-prompt-metric");
  const state = { model: 1, descending: false, rows: PAGE };
  metrics.forEach((metric, index) => select.append(element("option", { value: index }, metric)));
  select.value = trainedOn;

  function draw() {
    const metric = Number(select.value);
    const rows = sortedBy(gainsByPrompt(metric), (row) => row.gains[state.model], state.descending);
    const widest = Math.max(...rows.flatMap((row) => row.gains.slice(1).map(Math.abs)), 1e-12);
    const head = element("tr", {}, element("th", { scope: "col" }, "prompt"));
    head.append(element("th", { scope: "col", class: "number" }, "images"));
    for (let model = 1; model < models.length; model++) {
      const sorted = model === state.model;
      const order = sorted ? (state.descending ? "descending" : "ascending") : "none";
      const arrow = sorted ? (state.descending ? " ▼" : " ▲") : "";
      const button = element("button", { type: "button" }, `gain of ${models[model]}${arrow}`);
      button.addEventListener("click", () => {
        Object.assign(state, { model, descending: sorted && !state.descending });
        draw();
        find("by-prompt-table").querySelectorAll("thead button")[model - 1].focus();
      });
      head.append(element("th", { scope: "col", "aria-sort": order, class: "number" }, button));
    }
    const body = rows.slice(0, state.rows).map((row) => {
      const button = element("button", { type: "button" }, row.prompt);
      button.addEventListener("click", () => gallery.only(row.prompt));
      const line = element("tr", {}, element("th", { scope: "row" }, button));
      line.append(element("td", { class: "number" }, String(row.count)));
      for (const value of row.gains.slice(1)) {
        const width = (50 * Math.abs(value ?? 0)) / widest;
        const bar = element("span", { style: `width: ${width}%; left: ${value < 0 ? 50 - width : 50}%` });
        const track = element("span", { class: "track", "aria-hidden": "true" }, bar);
        const said = value === null ? "none" : signed(value, metric);
        line.append(element("td", { class: "number" }, element("span", { class: direction(value, metric) }, said), track));
      }
      return line;
    });
    find("by-prompt-table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
    const more = find("by-prompt-more");
    more.hidden = state.rows >= rows.length;
    more.textContent = `Show all ${rows.length} prompts`;
  }

  select.addEventListener("change", draw);
  find("by-prompt-more").addEventListener("click", () => {
    state.rows = prompts.length;
    draw();
  });
  draw();
}

// The reward that was trained on against every other -------------------------------------------------------------

function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const values = [];
  for (let index = Math.ceil(low / step); index * step <= high; index++) values.push(index * step);
  return values;
}

function range(values) {
  const [low, high] = extent(values);
  const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - margin, high + margin];
}

const tick = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

class Scatter {
  constructor(canvas, hidden) {
    [this.canvas, this.hidden, this.metric] = [canvas, hidden, Number(canvas.dataset.metric)];
    this.points = models.map((_, model) =>
      promptOf
        .map((_, image) => ({ model, image, x: scores[trainedOn][model][image], y: scores[this.metric][model][image] }))
        .filter((point) => point.x !== null && point.y !== null),
    );
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => (find("tip").hidden = true));
  }

  draw() {
    const { canvas } = this;
    const [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, window.devicePixelRatio || 1];
    const all = this.points.flat();
    if (!width || !all.length) return;
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const [left, bottom] = [62, 44];
    const [xs, ys] = [range(all.map((point) => point.x)), range(all.map((point) => point.y))];
    this.toX = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * (width - left - 10);
    this.toY = (y) => height - bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (height - bottom - 10);

    pen.font = "12px system-ui, sans-serif";
    pen.strokeStyle = colour("--line");
    pen.fillStyle = colour("--quiet");
    pen.beginPath();
    pen.textAlign = "center";
    for (const x of ticks(...xs)) {
      pen.moveTo(this.toX(x), 10);
      pen.lineTo(this.toX(x), height - bottom);
      pen.fillText(tick(x), this.toX(x), height - bottom + 15);
    }
    pen.textAlign = "right";
    for (const y of ticks(...ys)) {
      pen.moveTo(left, this.toY(y));
      pen.lineTo(width - 10, this.toY(y));
      pen.fillText(tick(y), left - 5, this.toY(y) + 4);
    }
    pen.stroke();
    pen.fillStyle = colour("--text");
    pen.textAlign = "center";
    pen.fillText(`${metrics[trainedOn]} (trained on)`, (left + width) / 2, height - 8, width - left - 10);
    pen.save();
    pen.translate(13, (height - bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(metrics[this.metric], 0, 0, height - bottom - 10);
    pen.restore();

    const visible = this.points.map((points, model) => (this.hidden.has(model) ? [] : points));
    visible.forEach((points, model) => {
      pen.fillStyle = colour(modelColour(model));
      pen.globalAlpha = 0.4;
      for (const { x, y } of points) {
        pen.beginPath();
        pen.arc(this.toX(x), this.toY(y), 2.5, 0, 2 * Math.PI);
        pen.fill();
      }
    });
    pen.globalAlpha = 1;
    // Both means over the same images: those with a score in both rewards.
    const means = this.points.map((points) => [mean(points.map(({ x }) => x)), mean(points.map(({ y }) => y))]);
    const halo = (draw, stroke, thickness) => {
      for (const [style, width] of [[colour("--page"), thickness + 3], [stroke, thickness]]) {
        [pen.strokeStyle, pen.lineWidth] = [style, width];
        draw();
      }
    };
    visible.forEach((points, model) => {
      if (!points.length) return;
      const [x, y] = [this.toX(means[model][0]), this.toY(means[model][1])];
      if (model && visible[0].length) {
        halo(() => {
          pen.beginPath();
          pen.moveTo(this.toX(means[0][0]), this.toY(means[0][1]));
          pen.lineTo(x, y);
          pen.stroke();
        }, colour(modelColour(model)), 2);
      }
    });
    visible.forEach((points, model) => {
      if (!points.length) return;
      const [x, y] = [this.toX(means[model][0]), this.toY(means[model][1])];
      pen.beginPath();
      pen.arc(x, y, 6, 0, 2 * Math.PI);
      pen.fillStyle = colour("--page");
      pen.fill();
      halo(() => pen.stroke(), colour(modelColour(model)), 3);
    });
  }

  point(event) {
    const tip = find("tip");
    let nearest = { distance: 10 };
    for (const { model, image, x, y } of this.toX ? this.points.flat() : []) {
      if (this.hidden.has(model)) continue;
      const distance = Math.hypot(this.toX(x) - event.offsetX, this.toY(y) - event.offsetY);
      if (distance < nearest.distance) nearest = { distance, model, image, x, y };
    }
    tip.hidden = nearest.model === undefined;
    if (tip.hidden) return;
    const { model, image, x, y } = nearest;
    const said = `${metrics[trainedOn]} ${number(x, trainedOn)}, ${metrics[this.metric]} ${number(y, this.metric)}`;
    const prompt = prompts[promptOf[image]];
    tip.replaceChildren(picture(model, image), element("strong", {}, models[model]), `: ${prompt}`, element("br", {}), said);
    const right = window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(4, Math.min(event.pageX + 14, right))}px`;
    tip.style.top = `${event.pageY + 14}px`;
  }
}

function showScatters() {
  const hidden = new Set();
  const scatters = [...document.querySelectorAll("canvas")].map((canvas) => new Scatter(canvas, hidden));
  const draw = () => scatters.forEach((scatter) => scatter.draw());
  models.forEach((name, model) => {
    const box = element("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](model);
      draw();
    });
    const dot = element("span", { class: "dot", style: `background: var(${modelColour(model)})` });
    find("legend").append(element("label", {}, box, " ", dot, name));
  });
  new ResizeObserver(draw).observe(document.querySelector(".panels"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

// The gallery ----------------------------------------------------------------------------------------------------

function picture(model, image) {
  const alt = `${models[model]}, image ${image}: ${prompts[promptOf[image]]}`;
  const node = element("img", { alt, loading: "lazy", decoding: "async", src: images[model][image] });
  node.addEventListener("load", () => node.classList.toggle("tiny", node.naturalWidth < 200));
  return node;
}

function row(image) {
  const strip = element("div", { class: "strip" });
  models.forEach((name, model) => {
    const list = element("dl", {});
    metrics.forEach((metric, index) => {
      const difference = model ? gain(index, model, image) : null;
      const gained = difference === null ? "" : signed(difference, index);
      list.append(
        element("dt", { title: metric }, metric),
        element("dd", {}, number(scores[index][model][image], index)),
        element("dd", { class: direction(difference, index) }, gained),
      );
    });
    const dot = element("span", { class: "dot", style: `background: var(${modelColour(model)})` });
    const caption = element("figcaption", {}, dot, element("strong", {}, name), list);
    strip.append(element("figure", {}, picture(model, image), caption));
  });
  const said = element("p", {}, prompts[promptOf[image]], " ");
  said.append(element("span", { class: "quiet" }, `image ${image}, seed ${seed + image}`));
  return element("li", { "data-image": image }, said, strip);
}

class Gallery {
  constructor() {
    [this.order, this.images, this.made] = ["drawn", [], 0];
    this.keys = []; // of the options of "Sort by": the number that an image is sorted by
    const add = (group, label, key) => {
      group.append(element("option", { value: this.keys.length }, label));
      this.keys.push(key);
    };
    const gains = element("optgroup", { label: `gain over ${models[0]}` });
    const rewards = element("optgroup", { label: "reward" });
    const first = [trainedOn, ...metrics.keys()].filter((metric, index, all) => all.indexOf(metric) === index);
    models.forEach((name, model) => {
      for (const metric of first) {
        if (model) add(gains, `${name}: gain in ${metrics[metric]}`, (image) => gain(metric, model, image));
        add(rewards, `${name}: ${metrics[metric]}`, (image) => scores[metric][model][image]);
      }
    });
    find("sort").append(...[gains, rewards].filter((group) => group.children.length));
    find("sort").selectedIndex = 0;
    for (const size of [96, 128, 192, 256, 384]) find("size").append(element("option", { value: size }, `${size} px`));
    find("size").value = 128;
    find("rows").style.setProperty("--models", models.length);

    for (const button of document.querySelectorAll("[data-order]")) {
      button.addEventListener("click", () => this.sort(button.dataset.order));
    }
    find("sort").addEventListener("change", () => this.sort(this.order === "drawn" ? "worst" : this.order));
    find("filter").addEventListener("input", () => {
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => this.show(), 120);
    });
    find("size").addEventListener("change", () => find("rows").style.setProperty("--size", `${find("size").value}px`));
    find("more").addEventListener("click", () => this.make());
    new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && this.make(), {
      rootMargin: "600px",
    }).observe(find("more"));
    this.show();
  }

  sort(order) {
    this.order = order;
    for (const button of document.querySelectorAll("[data-order]")) {
      button.setAttribute("aria-pressed", String(button.dataset.order === order));
    }
    this.show();
  }

  only(prompt) {
    find("filter").value = prompt;
    this.show();
    find("gallery").scrollIntoView();
    find("filter").focus({ preventScroll: true });
  }

  show() {
    const words = find("filter").value.toLowerCase().split(/\s+/).filter(Boolean).join(" ");
    const chosen = prompts.map((prompt) => prompt.toLowerCase().split(/\s+/).join(" ").includes(words));
    const all = [...promptOf.keys()].filter((image) => chosen[promptOf[image]]);
    const key = this.keys[Number(find("sort").value)];
    this.images = this.order === "drawn" ? all : sortedBy(all, key, this.order === "best");
    find("count").textContent = `${all.length} of ${promptOf.length} rows`;
    find("rows").replaceChildren();
    this.made = 0;
    this.make();
  }

  make() {
    const next = this.images.slice(this.made, this.made + PAGE);
    find("rows").append(...next.map(row));
    this.made += next.length;
    find("more").hidden = this.made >= this.images.length;
    find("more").textContent = `Show more (${this.images.length - this.made} left)`;
  }
}

const gallery = new Gallery();
if (find("by-prompt")) showByPrompt();
if (find("gaming")) showScatters();
