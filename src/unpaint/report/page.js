// Shows the data of the page: filters, table, plots, pictures. Numbers are shown as the texts that came with them.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { metrics, tables, runs, pictures } = data;
  const PAGE = 50, COLUMNS = 14, STRIP = 12, MANY = 300;
  // Okabe and Ito's colours, told apart by colour-blind readers; the symbols tell them apart without any colour.
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A7F87"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon", "star", "hexagon"];
  const state = { protocol: 0, concept: "", search: "", group: "main", sort: null, page: 0, size: PAGE, open: new Set() };

  const get = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== ""));
    return node;
  };
  const options = (select, entries, chosen) => {
    select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
    if (entries.some(([value]) => String(value) === String(chosen))) select.value = chosen;
  };
  const nameOf = (line) => (line.variant ? `${line.method} (${line.variant})` : line.method);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => document.documentElement.dataset.theme === "dark";
  const methods = [...new Set(tables.flatMap((table) => table.lines.map((line) => line.method)))];
  const hue = (method) => COLOURS[methods.indexOf(method) % COLOURS.length];
  const symbol = (method) => SYMBOLS[methods.indexOf(method) % SYMBOLS.length];

  // --- which lines

  const ownTables = () => tables.filter((table) => table.protocol === state.protocol);
  const EVERY = "*";
  function current() {
    const own = ownTables();
    const mean = own.find((table) => table.concept === null);
    if (state.concept === EVERY) {
      const lines = own.filter((table) => table.concept !== null)
        .flatMap((table) => table.lines.map((line) => ({ ...line, concept: table.concept, name: nameOf(line) })));
      return { base: (mean || own[0]).base, lines: lines.filter(matches), every: true };
    }
    const table = (state.concept === "" ? mean : own.find((one) => one.concept === state.concept)) || own[own.length - 1];
    const lines = table.lines.map((line) => ({ ...line, concept: table.concept, name: nameOf(line) }));
    return { base: table.base, lines: lines.filter(matches), every: false, concepts: table.concept === null ? table.concepts : 0 };
  }
  const matches = (line) => line.name.toLowerCase().includes(state.search) || (line.concept || "").toLowerCase() === state.search;

  // --- the table, twice: all numbers, and the costs

  const isCost = (metric) => metric.group === "Cost";
  const groups = [...new Set(metrics.map((metric) => metric.group))];
  const MAIN = ["erasure/ua", "erasure/ua_out_of_set", "pairs/first_only", "pairs/second_only", "retention/ira", "retention/cra", "fidelity/clip_score", "cost/erase_seconds"];
  const main = metrics.map((metric, i) => i).filter((i) => MAIN.includes(metrics[i].name) || /^attack\/[^/]+\/asr$/.test(metrics[i].name)
    || data.axes.includes(i));
  const has = (view, i) => [...view.lines, { cells: view.base }].some((line) => line.cells[i]);
  const mainOf = (view) => main.filter((i) => has(view, i)).slice(0, COLUMNS);
  function columns(view) {
    if (state.group === "main") return mainOf(view);
    return metrics.map((metric, i) => i).filter((i) => (state.group === "all" || metrics[i].group === state.group) && has(view, i));
  }

  function compared(a, b, sort) {
    const value = (line) => sort.key === "name" ? line.name : sort.key === "concept" ? line.concept : sort.key === "seeds" ? line.seeds
      : sort.key === "place" ? (data.weights ? line.score : line.rank) : line.cells[sort.key] && line.cells[sort.key][0];
    const x = value(a), y = value(b);
    if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
    if (y === null || y === undefined) return -1;
    const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return sort.down ? -order : order;
  }

  function headed(key, text, sub, title, sort, turn) {
    const direction = sort && sort.key === key ? (sort.down ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button", title: title || null, onclick: () => turn(key), "data-key": key }, text);
    return make("th", { scope: "col", "aria-sort": direction }, button, sub ? make("small", { title: sub }, sub) : "");
  }

  function cellOf(line, i, most, concepts) {
    const cell = line.cells[i], metric = metrics[i];
    if (!cell) return make("td", { class: "cell" }, "–");
    const share = metric.unit === "rate" ? cell[0] : most[i] > 0 ? cell[0] / most[i] : 0;
    const n = cell[5] === null ? "" : `n ${cell[5]}`;
    const width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    const unit = isCost(metric) ? "" : metric.unit === "rate" ? " %" : "";
    const said = `${metric.head}: ${cell[3]}${unit}${cell[4] ? `, 95 % interval ${cell[4]}` : ""}${n ? `, ${n}` : ""}${
      metric.detectors.length ? `, judged by ${metric.detectors.join(", ")}` : ""}`;
    const own = Math.max(...line.cells.map((one) => (one ? one[6] : 0)));
    const few = concepts && cell[6] < own ? `${cell[6]} of ${own}` : "";
    const small = [cell[4], n, few].filter(Boolean).join(" · ");
    return make("td", { class: `cell ${isCost(metric) ? "cost" : ""}`, style: `--w:${width}${share > 0.1 ? ";--some:1" : ""}`, title: said }, make("b", {}, cell[3]),
      small ? make("small", {}, small) : "");
  }

  function drawTable(node, view, shown, sort, turn, lines, opens) {
    const most = metrics.map((metric, i) => Math.max(0, ...[...view.lines, { cells: view.base }].map((line) => (line.cells[i] ? line.cells[i][0] : 0))));
    const place = data.weights ? "score" : "front";
    const head = make("tr", {}, headed("name", "method", "", "", sort, turn), view.every ? headed("concept", "concept", "", "", sort, turn) : "",
      headed("place", place, "", data.weights ? "" : "Pareto front of UA and retention, 1 is the best", sort, turn),
      headed("seeds", view.concepts ? "concepts" : "seeds", "", "", sort, turn),
      ...shown.map((i) => headed(i, `${metrics[i].head}${isCost(metrics[i]) ? "" : metrics[i].up ? "" : " (low)"}`,
        metrics[i].detectors.join(", "), `${metrics[i].name}: ${metrics[i].title}`, sort, turn)));
    const base = make("tr", { class: "base" }, make("th", { scope: "row" }, "unedited model"), view.every ? make("td") : "", make("td"), make("td"),
      ...shown.map((i) => cellOf({ cells: view.base }, i, most, view.concepts)));
    const body = [base];
    for (const line of lines) {
      const key = `${line.concept}|${line.name}`, open = opens && state.open.has(key);
      const label = make("span", {}, line.method);
      const name = opens
        ? make("button", { type: "button", "aria-expanded": String(open), onclick: () => { open ? state.open.delete(key) : state.open.add(key); draw(); } }, label)
        : label;
      const rank = data.weights ? (line.score === null ? "–" : line.score.toFixed(3)) : line.rank === null ? "–" : line.rank;
      body.push(make("tr", { class: line.rank === 1 ? "first" : null, "data-name": line.name },
        make("th", { scope: "row" }, name, line.variant ? make("small", { title: line.variant }, line.variant) : ""), view.every ? make("td", {}, line.concept) : "",
        make("td", { class: "place" }, String(rank)), make("td", {}, line.seeds), ...shown.map((i) => cellOf(line, i, most, view.concepts))));
      if (open) body.push(make("tr", { class: "details" }, make("td", { colspan: shown.length + 4 }, details(line, view.base))));
    }
    if (!lines.length) body.push(make("tr", {}, make("td", { colspan: shown.length + 4, class: "empty" }, "No method matches.")));
    node.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  }

  function details(line, base) {
    const own = runs.filter((run) => run.row === line.row);
    const there = metrics.map((metric, i) => i).filter((i) => line.cells[i]);
    const head = ["measured", "unedited", "edited", "95 % interval", "n", "judged by", ...own.map((run) => `seed ${run.seed}`)];
    const rows = there.map((i) => {
      const [, , , text, between, n] = line.cells[i];
      return make("tr", {}, make("th", { scope: "row" }, metrics[i].head, make("small", {}, ` ${metrics[i].name}`)),
        ...[base[i] ? base[i][3] : "–", text, between || "–", n === null ? "–" : n, metrics[i].detectors.join(", ") || "–",
          ...own.map((run) => run.texts[i] || "–")].map((one) => make("td", {}, String(one))));
    });
    const where = own.map((run) => make("p", { class: "note" }, `seed ${run.seed}: ${run.status}, ${run.when}, ${run.folder}`));
    return make("div", {}, make("table", { class: "plain" }, make("thead", {}, make("tr", {}, ...head.map((one) => make("th", { scope: "col" }, one)))),
      make("tbody", {}, ...rows)), ...where);
  }

  function turned(sort, key) {
    if (sort && sort.key === key) return { key, down: !sort.down };
    const good = typeof key === "number" ? metrics[key].up : key === "place" && data.weights;
    return { key, down: good };
  }

  // A group of which no line has a number is not offered.
  function drawTabs(view) {
    const filled = new Set(metrics.filter((metric, i) => has(view, i)).map((metric) => metric.group));
    if (groups.includes(state.group) && !filled.has(state.group)) state.group = "main";
    for (const button of get("groups").children) {
      const group = button.dataset.group;
      button.hidden = groups.includes(group) && !filled.has(group);
      button.setAttribute("aria-pressed", String(group === state.group));
    }
  }

  function drawNumbers(view) {
    drawTabs(view);
    const lines = state.sort ? [...view.lines].sort((a, b) => compared(a, b, state.sort)) : view.lines;
    const pages = Math.max(1, Math.ceil(lines.length / state.size));
    state.page = Math.min(state.page, pages - 1);
    const from = state.page * state.size, part = lines.slice(from, from + state.size);
    drawTable(get("table"), view, columns(view), state.sort, (key) => {
      state.sort = turned(state.sort, key); state.page = 0; draw();
      const button = get("table").querySelector(`[data-key="${key}"]`);
      if (button) button.focus();
    }, part, true);
    const step = (by) => () => { state.page += by; draw(); };
    get("pager").replaceChildren(...(pages > 1 ? [
      make("button", { type: "button", disabled: state.page === 0, onclick: step(-1) }, "Previous"),
      `${from + 1}–${from + part.length} of ${lines.length}`,
      make("button", { type: "button", disabled: state.page === pages - 1, onclick: step(1) }, "Next")] : []));
    get("live").textContent = `${lines.length} row${lines.length === 1 ? "" : "s"}`;
  }

  let costSort = null;
  function drawCost(view) {
    if (!get("cost")) return;
    const shown = metrics.map((metric, i) => i).filter((i) => isCost(metrics[i]) && metrics[i].name !== "cost/world_size");
    const lines = (costSort ? [...view.lines].sort((a, b) => compared(a, b, costSort)) : view.lines).slice(0, state.size);
    drawTable(get("cost"), { ...view, base: metrics.map(() => null) }, shown, costSort, (key) => { costSort = turned(costSort, key); draw(); }, lines, false);
    get("cost").querySelector(".base").remove();
  }

  // --- plots

  function layout(x, y, legend) {
    const ink = colour("--ink"), line = colour("--line"), faint = colour("--faint");
    const axis = (title) => ({ title: { text: title, font: { size: 13, color: faint } }, gridcolor: line, zerolinecolor: line, linecolor: line,
      tickfont: { color: faint }, automargin: true });
    return { paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { family: "system-ui, sans-serif", color: ink, size: 13 },
      margin: { l: 60, r: 20, t: 34, b: 54 }, modebar: { bgcolor: "transparent", color: line, activecolor: faint }, xaxis: axis(x), yaxis: axis(y), showlegend: legend, hovermode: "closest",
      legend: { orientation: "h", y: -0.2, font: { color: ink } },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line-strong"), font: { color: ink, family: "system-ui, sans-serif" }, align: "left" } };
  }
  const settings = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const scale = (i) => (metrics[i].unit === "rate" || metrics[i].unit === "cosine" ? 100 : 1);
  const label = (i) => `${metrics[i].head}${metrics[i].unit === "rate" ? " (%)" : metrics[i].unit === "seconds" ? " (s)" : ""}${metrics[i].up ? "" : ", less is better"}`;
  const canGl = () => { try { return !!document.createElement("canvas").getContext("webgl"); } catch { return false; } };

  function hover(line, shown) {
    const told = shown.filter((i) => line.cells[i]).map((i) => {
      const [, , , text, between, n] = line.cells[i];
      return `${escaped(metrics[i].head)} <b>${text}</b>${between ? ` (${between})` : ""}${n === null ? "" : `, n ${n}`}`;
    });
    const judges = [...new Set(shown.flatMap((i) => (line.cells[i] ? metrics[i].detectors : [])))];
    const variant = line.variant ? `<br>${escaped(line.variant.slice(0, 70))}` : "";
    return `<b>${escaped(line.method)}</b>${line.concept ? ` on ${escaped(line.concept)}` : ""}${variant}<br>${told.join("<br>")}<br>${
      line.concept ? "seeds" : "concepts"}: ${escaped(line.seeds)}${judges.length ? `<br>judged by ${escaped(judges.join(", "))}` : ""}`;
  }

  function front(lines, x, y) {
    const sign = (i) => (metrics[i].up ? 1 : -1);
    const points = lines.map((line) => [line.cells[x][0] * sign(x), line.cells[y][0] * sign(y), line]);
    const best = points.filter(([a, b]) => !points.some(([c, d]) => c >= a && d >= b && (c > a || d > b)));
    return best.sort((p, q) => p[0] - q[0]).map(([, , line]) => line);
  }

  // The range follows the methods. The unedited model has a UA of 0: an axis down to it would squeeze all others to its end, so it
  // is part of the range only where it lies near.
  function extent(lines, i, base) {
    const rate = metrics[i].unit === "rate", bars = lines.length <= 60 ? [0, 1, 2] : [0];
    const values = lines.flatMap((line) => bars.map((k) => line.cells[i][k]).filter((value) => value !== null)).map((value) => value * scale(i));
    let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, scale(i)];
    const least = rate ? 4 : Math.abs(high) * 0.02 || 1;
    const own = Math.max(high - low, least), at = base ? base[0] * scale(i) : null;
    const near = at !== null && at >= low - own / 2 && at <= high + own / 2;
    if (near) [low, high] = [Math.min(low, at), Math.max(high, at)];
    const margin = Math.max(high - low, least) * 0.07, middle = (low + high) / 2, half = Math.max(high - low, least) / 2 + margin;
    return { range: [middle - half, middle + half], near, at };
  }

  // Few lines that are much worse than all others in a rate, as one that changes nothing is: the axis is not drawn down to them.
  function apartFrom(lines, i) {
    if (metrics[i].unit !== "rate") return [];
    const order = [...lines].sort((a, b) => (metrics[i].up ? 1 : -1) * (a.cells[i][0] - b.cells[i][0]));
    const most = Math.max(1, Math.floor(lines.length / 4));
    const cut = order.findIndex((line, k) => k > 0 && k <= most && Math.abs(line.cells[i][0] - order[k - 1].cells[i][0]) > 0.4);
    return cut > 0 ? order.slice(0, cut) : [];
  }

  // Where each name stands beside its mark so that it hides as little as possible of marks and of names placed before it.
  function placed(lines, x, y, across, up, named, taken) {
    const wide = Math.max(300, get("trade").clientWidth - 90), high = Math.max(200, get("trade").clientHeight - 80), found = new Map();
    const spot = (line, i, range, size) => ((line.cells[i][0] * scale(i) - range[0]) / (range[1] - range[0])) * size;
    const marks = lines.map((line) => [metrics[x].up ? spot(line, x, across, wide) : wide - spot(line, x, across, wide), metrics[y].up ? high - spot(line, y, up, high) : spot(line, y, up, high)]);
    const boxes = marks.map(([a, b]) => [a - 8, b - 8, a + 8, b + 8]);
    for (const box of taken(wide, high)) boxes.push(box);
    lines.forEach((line, k) => {  // the intervals
      const [low, high_] = [1, 2].map((n) => (line.cells[x][n] ?? line.cells[x][0]) * scale(x)), unit = wide / (across[1] - across[0]);
      if (metrics[x].up) boxes.push([(low - across[0]) * unit, marks[k][1] - 3, (high_ - across[0]) * unit, marks[k][1] + 3]);
    });
    const sides = [["top left", -1, -1], ["top right", 1, -1], ["bottom left", -1, 1], ["bottom right", 1, 1], ["middle left", -1, 0], ["middle right", 1, 0], ["top center", 0, -1], ["bottom center", 0, 1]];
    lines.forEach((line, k) => {
      const [a, b] = marks[k], width = named(line).length * 6.6 + 6;
      const tried = sides.map(([side, h, v]) => {
        const left = h < 0 ? a - 8 - width : h > 0 ? a + 8 : a - width / 2, top = v < 0 ? b - 24 : v > 0 ? b + 8 : b - 8, box = [left, top, left + width, top + 16];
        const shared = boxes.reduce((sum, [l, t, r, d], other) => sum + (other === k ? 0 : Math.max(0, Math.min(r, box[2]) - Math.max(l, box[0])) * Math.max(0, Math.min(d, box[3]) - Math.max(t, box[1]))), 0);
        const outside = Math.max(0, -box[0]) + Math.max(0, box[2] - wide) + Math.max(0, -box[1]) + Math.max(0, box[3] - high);
        return { side, box, cost: shared + 40 * outside };
      });
      const best = tried.reduce((least, one) => (one.cost < least.cost ? one : least));
      found.set(line, best.side); boxes.push(best.box);
    });
    return found;
  }

  // A star where the unedited model lies among the methods; else a line at the one of its two numbers that does, and words for the other.
  function drawUnedited(base, x, y, across, up, traces, axes, shown) {
    if (!base[x] || !base[y]) return;
    const faint = colour("--faint"), text = (i) => `${metrics[i].head} ${base[i][3]}`;
    if (across.near && up.near) {
      traces.push({ type: "scatter", mode: "markers+text", x: [across.at], y: [up.at], name: "unedited model", text: ["unedited"], textposition: "bottom right", textfont: { size: 12, color: faint },
        marker: { symbol: "star-open", size: 15, color: faint, line: { width: 2 } }, customdata: [[null, null, hover({ method: "unedited model", cells: base, seeds: "–" }, shown)]], hovertemplate: "%{customdata[2]}<extra></extra>", showlegend: false });
      return;
    }
    const line = { type: "line", line: { color: faint, width: 1.5, dash: "dash" } }, plain = { showarrow: false, font: { size: 12, color: faint }, bgcolor: colour("--paper"), borderpad: 1 };
    const far = across.at < across.range[0] === metrics[x].up ? "left" : "right";
    if (up.near) {
      axes.shapes = [{ ...line, xref: "paper", x0: 0, x1: 1, y0: up.at, y1: up.at, layer: "below" }];
      axes.annotations.push({ ...plain, xref: "paper", x: far === "left" ? 0 : 1, xanchor: far, y: up.at, yanchor: "bottom", text: `${far === "left" ? "← " : ""}unedited model: ${text(y)} at ${text(x)}${far === "right" ? " →" : ""}` });
    } else if (across.near) {
      axes.shapes = [{ ...line, yref: "paper", y0: 0, y1: 1, x0: across.at, x1: across.at, layer: "below" }];
      axes.annotations.push({ ...plain, yref: "paper", y: 0, yanchor: "bottom", x: across.at, xanchor: "right", text: `unedited model: ${text(x)}` });
    } else axes.annotations.push({ ...plain, xref: "paper", yref: "paper", x: 0, xanchor: "left", y: 0, yanchor: "bottom", text: `unedited model, outside: ${text(x)}, ${text(y)}` });
  }

  function drawTrade(view) {
    const x = Number(get("axis-x").value), y = Number(get("axis-y").value), shown = [...new Set([x, y, ...mainOf(view)])];
    const known = (line, i) => line.cells[i] && line.cells[i][0] !== null;  // null: what never came to its end
    const lines = view.lines.filter((line) => known(line, x) && known(line, y));
    const kind = lines.length > MANY && canGl() ? "scattergl" : "scatter", few = lines.length <= 14, traces = [];
    // A mean over fewer concepts answers another question: it is shown, but not on the front.
    const whole = (line, i) => !view.concepts || line.cells[i][6] === view.concepts;
    const ranked = lines.filter((line) => line.rank !== null && whole(line, x) && whole(line, y));
    const best = view.every ? [] : front(ranked, x, y);
    const far = new Set([...apartFrom(lines, x), ...apartFrom(lines, y)]), near = lines.filter((line) => !far.has(line));
    const across = extent(near, x, view.base[x]), up = extent(near, y, view.base[y]);
    const steps = (i) => best.map((l) => l.cells[i][0] * scale(i)), worst = (i, range) => (metrics[i].up ? range[0] : range[1]);
    if (best.length) traces.push({ type: "scatter", mode: "lines", x: [worst(x, across.range), ...steps(x), steps(x).pop()], y: [steps(y)[0], ...steps(y), worst(y, up.range)],
      line: { color: colour("--front"), width: 1.5, dash: "dot", shape: "vh" }, hoverinfo: "skip", name: "Pareto front" });
    const named = (line) => escaped(methods.length > 1 && lines.filter((one) => one.method === line.method).length === 1 ? line.method : line.name.slice(0, 30));
    const words = (wide, high) => {  // of the unedited model's line
      const at = high * (1 - (up.at - up.range[0]) / (up.range[1] - up.range[0]));
      return [...(up.near && !across.near && metrics[y].up ? [[0, at - 19, 250, at]] : []), ...(far.size ? [[0, high - 17 * (Math.min(far.size, 2) + 1), 250, high]] : [])];
    };
    const places = few ? placed(near, x, y, across.range, up.range, named, words) : new Map();
    const away = (cell, i, k) => (cell[k] === null ? 0 : Math.abs(cell[k] - cell[0]) * scale(i));
    for (const method of methods) {
      const own = lines.filter((line) => line.method === method);
      if (!own.length) continue;
      const bars = (i) => ({ type: "data", symmetric: false, array: own.map((l) => away(l.cells[i], i, 2)), arrayminus: own.map((l) => away(l.cells[i], i, 1)),
        color: hue(method), thickness: 1, width: 0, visible: lines.length <= 60 });
      traces.push({ type: kind, mode: few ? "markers+text" : "markers", name: method, x: own.map((l) => l.cells[x][0] * scale(x)), y: own.map((l) => l.cells[y][0] * scale(y)),
        error_x: bars(x), error_y: bars(y), marker: { color: hue(method), symbol: symbol(method), size: 12, opacity: own.map((l) => (l.rank === null ? 0.35 : 1)), line: { color: colour("--paper"), width: 1 } },
        textposition: own.map((l) => places.get(l)), textfont: { size: 12, color: colour("--ink") }, text: few ? own.map(named) : undefined,
        customdata: own.map((l) => [l.name, l.concept || "", hover(l, shown)]), hovertemplate: "%{customdata[2]}<extra></extra>" });
    }
    const axes = layout(label(x), label(y), !few && methods.length > 1);
    axes.xaxis.range = metrics[x].up ? across.range : [...across.range].reverse();
    axes.yaxis.range = metrics[y].up ? up.range : [...up.range].reverse();
    axes.annotations = [];
    drawUnedited(view.base, x, y, across, up, traces, axes, shown);
    const rows = (method) => [...far].filter((line) => line.method === method).length;
    const told = far.size <= 2
      ? [...far].map((line) => `${named(line)}${view.every ? ` on ${escaped(line.concept)}` : ""}: ${metrics[y].head} ${line.cells[y][3]} at ${metrics[x].head} ${line.cells[x][3]}`)
      : [methods.filter(rows).map((method) => `${escaped(method)}, ${rows(method)} row${rows(method) > 1 ? "s" : ""}`).join("; ")];
    if (far.size) axes.annotations.push({ showarrow: false, align: "left", font: { size: 12, color: colour("--faint") }, xref: "paper", yref: "paper", x: 0, xanchor: "left", y: 0, yanchor: "bottom",
      text: ["outside:", ...told].join("<br>") });
    Plotly.react("trade", traces, axes, settings);
    get("trade").removeAllListeners("plotly_click");
    get("trade").on("plotly_click", (event) => {
      const [name, concept] = event.points[0].customdata || [];
      if (!name || !get("wall")) return;
      if (concept) get("wall-concept").value = concept;
      seedsOfWall(); get("wall-method").value = name; drawWall();
      get("wall-section").scrollIntoView(); get("wall-title").focus();
    });
  }

  const attacks = [...new Set(metrics.map((m) => m.name.match(/^(attack\/.+)\/pre_asr$/)).filter(Boolean).map((m) => m[1]))];
  function drawRobust(view) {
    if (!get("robust")) return;
    const at = (name) => metrics.findIndex((metric) => metric.name === `${get("attack").value}/${name}`);
    const before = at("pre_asr"), after = at("asr"), control = at("control_asr");
    const lines = view.lines.filter((line) => line.cells[before] && line.cells[after]).slice(0, 40).reverse();
    const names = lines.map((line) => (view.every ? `${line.name} · ${line.concept}` : line.name).slice(0, 60));
    const spread = { type: "scatter", mode: "lines", line: { color: colour("--line-strong"), width: 3 }, hoverinfo: "skip", x: [], y: [] };
    lines.forEach((line, i) => { spread.x.push(line.cells[before][0] * 100, line.cells[after][0] * 100, null); spread.y.push(names[i], names[i], null); });
    const dots = (i, open, name) => ({ type: "scatter", mode: "markers", name, x: lines.map((l) => (l.cells[i] ? l.cells[i][0] * 100 : null)), y: names,
      marker: { size: 12, symbol: open, color: lines.map((l) => hue(l.method)), line: { width: 2, color: lines.map((l) => hue(l.method)) } },
      text: lines.map((l) => hover(l, [before, after, control].filter((k) => k >= 0))), hovertemplate: "%{text}<extra></extra>" });
    const traces = [spread, dots(before, "circle-open", "before the attack"), dots(after, "circle", "after it")];
    if (control >= 0) traces.push(dots(control, "line-ns-open", "the same attack for what was never learned"));
    const axes = layout("pictures that show the concept (%)", "", false);
    axes.xaxis.range = [-3, 103];
    get("robust").style.height = `${Math.max(160, 90 + 34 * lines.length)}px`;
    Plotly.react("robust", traces, axes, settings);
  }

  // --- damage

  function drawDamage() {
    const node = get("damage");
    if (!node) return;
    const own = ownTables().filter((table) => table.concept !== null)
      .flatMap((table) => table.lines.filter((line) => data.damage[line.row]).map((line) => ({ ...line, concept: table.concept, name: nameOf(line) })));
    const names = [...new Set(own.map((line) => line.name))];
    const select = get("damage-method"), sought = names.filter((name) => name.toLowerCase().includes(state.search));
    options(select, (sought.length ? sought : names).map((name) => [name, name]), select.value);
    const rows = own.filter((line) => line.name === select.value);
    const labels = [...new Set(rows.flatMap((line) => Object.keys(data.damage[line.row].labels)))];
    const words = (one) => one.split("+").map((part) => part.split("/").pop().replace(/_/g, " ")).join(" + ");
    const head = make("tr", {}, make("td"), ...labels.map((one) => make("th", { scope: "col" }, words(one))));
    const body = rows.map((line) => {
      const { labels: found, erased } = data.damage[line.row];
      return make("tr", {}, make("th", { scope: "row" }, line.concept), ...labels.map((one) => {
        if (!found[one]) return make("td", {}, "");
        const [value, base, n] = found[one], aim = erased.includes(one);
        const lost = aim ? 0 : base > 0 ? Math.max(0, Math.min(1, 1 - value / base)) : 0;
        const said = `${line.concept} erased, ${words(one)} asked for: ${Math.round(value * 100)} % show it, ${Math.round(base * 100)} % unedited, n ${n}${aim ? ", to be erased" : ""}`;
        return make("td", { class: aim ? "aim" : null, title: said, style: `background:rgba(var(--lost),${(lost * 0.8).toFixed(2)})` },
          `${Math.round(value * 100)}`, make("small", {}, `${Math.round(base * 100)}`));
      }));
    });
    node.replaceChildren(make("caption", { class: "note" }, "in %"), make("thead", {}, head), make("tbody", {}, ...body));
  }

  // --- pictures

  const ownCards = () => data.cards.filter((card) => card[0] === state.protocol);
  function seedsOfWall() {
    if (!get("wall")) return;
    const seeds = [...new Set(ownCards().filter((card) => card[1] === get("wall-concept").value).map((card) => card[2]))].sort((a, b) => a - b);
    options(get("wall-seed"), seeds.map((seed) => [seed, seed]), get("wall-seed").value);
    const names = [...new Set(ownTables().flatMap((table) => table.lines.map(nameOf)))].sort();
    options(get("wall-method"), [["", "all"], ...names.map((name) => [name, name])], get("wall-method").value);
  }
  const lineOfRow = new Map(tables.filter((table) => table.concept !== null).flatMap((table) => table.lines.map((line) => [line.row, line])));
  let whole = new Set();
  function drawWall() {
    if (!get("wall")) return;
    const concept = get("wall-concept").value, seed = Number(get("wall-seed").value), fate = get("wall-fate").value;
    const only = get("wall-method").value;
    const cards = ownCards().filter((card) => card[1] === concept && card[2] === seed && (!fate || (fate === "to stay" ? card[4].endsWith(fate) : card[4] === fate)));
    const picture = (at, words, name, unedited) => make("figure", { class: unedited ? "unedited" : null },
      make("img", { src: pictures[at], alt: words, loading: "lazy", width: 116, height: 116 }), make("figcaption", { title: name }, name));
    get("wall").replaceChildren(...cards.map((card, k) => {
      const [, , , prompt, kind, before, after] = card;
      const own = after.map(([row, at]) => [lineOfRow.get(row), at])
        .filter(([line]) => line && (only ? nameOf(line) === only : matches({ ...line, name: nameOf(line), concept })));
      const order = new Map(current().lines.map((line, i) => [line.name, i]));
      own.sort(([a], [b]) => (order.get(nameOf(a)) ?? 1e9) - (order.get(nameOf(b)) ?? 1e9));
      const shown = whole.has(k) ? own : own.slice(0, STRIP);
      const more = own.length > shown.length ? make("button", { type: "button", class: "more", onclick: () => { whole.add(k); drawWall(); } }, `${own.length - shown.length} more`) : "";
      return make("div", { class: "card" }, make("p", {}, `“${prompt}”`, make("span", { class: `fate ${kind === "to be erased" ? "gone" : ""}` }, kind)),
        make("div", { class: "strip" }, picture(before, `${prompt}, unedited model, seed ${seed}`, "unedited", true),
          ...shown.map(([line, at]) => picture(at, `${prompt}, ${concept} erased by ${nameOf(line)}, seed ${seed}`, nameOf(line), false)), more));
    }));
    if (!cards.length) get("wall").replaceChildren(make("p", { class: "empty" }, "No pictures for this choice."));
  }

  // --- two runs

  function drawDifference() {
    const [a, b] = [get("run-a").value, get("run-b").value].map((i) => runs[Number(i)]);
    const whole = (run) => Object.assign({}, ...run.parts.map((part) => data.parts[part]));
    const left = whole(a), right = whole(b), keys = [...new Set([...Object.keys(left), ...Object.keys(right)])].sort();
    const told = (side, key) => (key in side ? String(side[key]) : "–");
    const rows = keys.filter((key) => told(left, key) !== told(right, key))
      .map((key) => make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, told(left, key)), make("td", {}, told(right, key))));
    const head = make("tr", {}, ...["option", `A: ${a.id}`, `B: ${b.id}`].map((one) => make("th", { scope: "col" }, one)));
    get("difference").replaceChildren(make("thead", {}, head), make("tbody", {}, ...(rows.length ? rows
      : [make("tr", {}, make("td", { colspan: 3, class: "empty" }, "Their configs are the same."))])));
  }

  // --- all of it

  function draw() {
    const view = current();
    drawTrade(view); drawNumbers(view); drawRobust(view); drawDamage(); drawCost(view); drawWall();
  }

  function concepts() {
    const own = ownTables().filter((table) => table.concept !== null).map((table) => table.concept);
    const several = own.length > 1 ? [["", `mean over ${own.length}`], [EVERY, "each, row by row"]] : [];
    options(get("concept"), [...several, ...own.map((one) => [one, one])], state.concept);
    state.concept = get("concept").value;
    if (!get("wall")) return;
    options(get("wall-concept"), [...new Set(ownCards().map((card) => card[1]))].sort().map((one) => [one, one]), state.concept || get("wall-concept").value);
    seedsOfWall();
  }

  function start() {
    options(get("protocol"), data.protocols.map((protocol, i) => [i, protocol.name]), 0);
    get("measured-label").hidden = data.protocols.length < 2;
    const numbers = metrics.map((metric, i) => [i, `${metric.head} (${metric.name})`]);
    const [x, y] = data.axes.length === 2 ? data.axes : [0, Math.min(1, metrics.length - 1)];
    options(get("axis-x"), numbers, x); options(get("axis-y"), numbers, y);
    if (get("attack")) options(get("attack"), attacks.map((name) => [name, name.slice(7).replace(/_/g, " ")]));
    const named = runs.map((run, i) => [i, `${nameOf(lineOfRow.get(run.row) || { method: "?" })}, ${conceptOf(run)}, seed ${run.seed} (${run.id})`]);
    options(get("run-a"), named, 0); options(get("run-b"), named, Math.min(1, runs.length - 1));
    const tabs = [["main", "Overview"], ...groups.map((group) => [group, group]), ["all", "Everything"]];
    get("groups").replaceChildren(...tabs.map(([key, text]) => make("button", { type: "button", "data-group": key,
      onclick: () => { state.group = key; drawNumbers(current()); } }, text)));
    const on = (id, kind, action) => { if (get(id)) get(id).addEventListener(kind, action); };
    on("protocol", "change", () => { state.protocol = Number(get("protocol").value); state.page = 0; concepts(); draw(); });
    on("concept", "change", () => { state.concept = get("concept").value; state.page = 0; concepts(); draw(); });
    on("search", "input", () => { state.search = get("search").value.trim().toLowerCase(); state.page = 0; draw(); });
    for (const id of ["axis-x", "axis-y"]) on(id, "change", () => drawTrade(current()));
    on("attack", "change", () => drawRobust(current()));
    on("damage-method", "change", drawDamage);
    on("wall-concept", "change", () => { seedsOfWall(); whole = new Set(); drawWall(); });
    on("wall-seed", "change", drawWall); on("wall-method", "change", drawWall); on("wall-fate", "change", () => { whole = new Set(); drawWall(); });
    on("run-a", "change", drawDifference); on("run-b", "change", drawDifference);
    on("theme", "click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; draw(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.matches ? "dark" : "light"; draw(); });
    // Paper has no next page button.
    addEventListener("beforeprint", () => { state.size = 1e6; state.page = 0; draw(); });
    addEventListener("afterprint", () => { state.size = PAGE; draw(); });
    if (get("wall-title")) get("wall-title").tabIndex = -1;
    concepts(); draw(); drawDifference();
    document.documentElement.dataset.ready = "yes";
  }
  const conceptOf = (run) => (tables.find((table) => table.concept !== null && table.lines.some((line) => line.row === run.row)) || { concept: "?" }).concept;
  start();
})();
