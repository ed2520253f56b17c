// The explorer and its calculator: forms in, a Vega-Lite figure and tables out.
const form = document.getElementById("explorer-form");
const dark = () => document.documentElement.dataset.theme === "dark";
const number = x => x === 0 ? "0" : Number(x.toPrecision(3)).toString().replace("-", "−");
const option = (value, text) => new Option(text ?? value, value);

// Light and dark turned round, hues kept: as the style sheet does with the figures.
const turned = hex => {
  const c = [1, 3, 5].map(i => 1 - parseInt(hex.slice(i, i + 2), 16) / 255);
  const grey = 0.213 * c[0] + 0.715 * c[1] + 0.072 * c[2];
  const all = c.map(x => Math.round(255 * Math.min(1, Math.max(0, 2 * grey - x))));
  return "#" + all.map(x => x.toString(16).padStart(2, "0")).join("");
};

const table = (caption, heads, rows) => {
  const made = document.createElement("table");
  made.className = "table";
  made.createCaption().textContent = caption;
  const head = made.createTHead().insertRow();
  for (const text of heads) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const text of row) line.insertCell().textContent = text;
  }
  return made;
};

const world = () => EXPLORER.worlds[form.world.value];
const picked = () => [...form.querySelectorAll("#arms input:checked")].map(box => box.value);

// One row a point: arm, x, mean, low, high, kind (arm or null).
const points = () => {
  const {x, metric, readout} = Object.fromEntries(new FormData(form));
  const name = metric + readout;
  const rows = [];
  for (const arm of picked()) {
    const of = world()[arm];
    const from = x === "layer" ? of.layers : of.metrics;
    for (const kind of form.null.checked ? ["", "null_"] : [""]) {
      (from[kind + name] || []).forEach((value, i) => {
        const last = of.step[of.step.length - 1];
        const at = {layer: i, step: of.step[i], frac: of.step[i] / last}[x]
          ?? of.metrics[x]?.[i]?.[0];
        if (value && at !== undefined)
          rows.push({arm: EXPLORER.arms[arm][0], key: arm + kind, x: at, y: value[0],
            low: value[1], high: value[2], n: of.seeds.length, seeds: of.seeds.join(", "),
            kind: kind ? "Gaussian null" : "arm"});
      });
    }
  }
  return rows;
};

const draw = () => {
  const rows = points();
  const label = EXPLORER.metrics[form.metric.value] + (form.readout.value ? ", bf16" : "");
  const over = form.x.selectedOptions[0].text;
  const names = picked();
  const shade = arm => dark() ? turned(EXPLORER.arms[arm][1]) : EXPLORER.arms[arm][1];
  const dashes = {"-": [1, 0], "--": [8, 4], ":": [2, 3], "-.": [8, 3, 2, 3]};
  const text = dark() ? "#cccccc" : "#333333";
  const log = form.log.checked && rows.every(row => row.low > 0);
  const along = form.x.value.endsWith("norm") && rows.every(row => row.x > 0);
  const axis = (field, title, isLog) =>
    ({field, type: "quantitative", title, scale: {type: isLog ? "log" : "linear", zero: false}});
  const colour = {field: "arm", type: "nominal", title: null,
    scale: {domain: names.map(a => EXPLORER.arms[a][0]), range: names.map(shade)},
    legend: {orient: "bottom", symbolOpacity: 1, symbolType: "stroke", symbolStrokeWidth: 3, columns: innerWidth < 600 ? 1 : 3, labelLimit: 300}};
  const x = axis("x", over, along);
  const y = axis("y", label, log);
  const hover = [["arm", "arm"], ["kind", "of"], ["x", over], ["y", "mean"], ["low", "lowest"],
    ["high", "highest"], ["n", "n"], ["seeds", "seeds"]]
    .map(([field, title]) => ({field, title, ...(field.length < 5 && "xylowhigh".includes(field)
      ? {type: "quantitative", format: ".4~g"} : {})}));
  const isArm = "datum.kind === 'arm'";
  vegaEmbed("#explorer-plot", {
    width: document.getElementById("explorer-plot").clientWidth, height: 360,
    autosize: {type: "fit", contains: "padding"}, background: "transparent", data: {values: rows},
    config: {axis: {labelColor: text, titleColor: text, gridOpacity: 0.25, labelFontSize: 12,
      titleFontSize: 13}, legend: {labelColor: text, labelFontSize: 13}, view: {stroke: null}},
    layer: [
      {transform: [{filter: isArm}], mark: {type: "area", opacity: 0.18},
        encoding: {x, y: {...y, field: "low"}, y2: {field: "high"}, color: colour, detail: {field: "key"}}},
      {transform: [{filter: isArm}], mark: {type: "line", strokeWidth: 2},
        encoding: {x, y, color: colour, order: {field: "x"}, detail: {field: "key"},
          strokeDash: {field: "arm", legend: null, scale: {domain: names.map(a => EXPLORER.arms[a][0]),
            range: names.map(a => dashes[EXPLORER.arms[a][2]] || [1, 0])}}}},
      {transform: [{filter: "!(" + isArm + ")"}], mark: {type: "line", strokeDash: [2, 4]},
        encoding: {x, y, color: colour, detail: {field: "key"}}},
      {mark: {type: "point", filled: true, size: 45},
        encoding: {x, y, color: colour, tooltip: hover}},
    ],
  }, {actions: false, renderer: "svg", ast: true});
  document.getElementById("explorer-note").textContent = rows.length ? ""
    : `The chosen arms have no ${label} over ${over}: choose another readout or axis.`;
  document.getElementById("explorer-table").replaceChildren(table(
    `${label} over ${over}, means over seeds`, ["arm", "of", over, "mean", "lowest", "highest", "n"],
    rows.map(r => [r.arm, r.kind, number(r.x), number(r.y), number(r.low), number(r.high), r.n])));
  document.getElementById("chosen-arms").textContent =
    names.map(arm => EXPLORER.arms[arm][0]).join(", ") || "none";
};

const remember = () => {
  const kept = new URLSearchParams([...new FormData(form)].filter(([key]) => key !== "arm"));
  kept.set("arms", picked().join(" "));
  history.replaceState(null, "", "#" + kept);
};

const start = () => {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(EXPLORER.worlds)) form.world.add(option(name));
  for (const [name, text] of Object.entries(EXPLORER.metrics))
    if (!name.endsWith("_bf16")) form.metric.add(option(name, text));
  for (const name of ["world", "metric", "readout", "x"])
    if (asked.get(name)) form[name].value = asked.get(name);
  if (!asked.get("metric")) form.metric.value = "stable_rank";
  form.null.checked = asked.has("null");
  form.log.checked = asked.has("log");
  const arms = (asked.get("arms") || "sft sft-matched opd rlvr").split(/[ +]/);
  for (const [arm, [label]] of Object.entries(EXPLORER.arms)) {
    const line = document.createElement("label");
    const box = document.createElement("input");
    Object.assign(box, {type: "checkbox", name: "arm", value: arm, checked: arms.includes(arm)});
    line.append(box, " " + label);
    line.dataset.arm = arm;
    document.getElementById("arms").append(line);
  }
  const change = () => {
    for (const line of document.querySelectorAll("#arms label"))
      line.hidden = !(line.dataset.arm in world());
    draw();
    remember();
  };
  form.addEventListener("change", change);
  new MutationObserver(draw).observe(document.documentElement, {attributeFilter: ["data-theme"]});
  change();
};

// --- the calculator ---------------------------------------------------------------

const sum = document.getElementById("calculator-form");
const {scale, density} = EXPLORER.unplaced;
const laws = Object.keys(density);

const between = (xs, ys, x) => {
  const i = Math.max(1, Math.min(xs.length - 1, xs.findIndex(other => other >= x)));
  const share = (x - xs[i - 1]) / (xs[i] - xs[i - 1] || 1);
  return ys[i - 1] + Math.min(1, Math.max(0, share)) * (ys[i] - ys[i - 1]);
};
const logs = scale.map(Math.log);
const span = values => [values[0], Math.min(...values), Math.max(...values)];
const ofLaws = (name, at) => span(laws.map((law, i) => between(logs, EXPLORER.unplaced[name][law], at[i])));

// Committed Gaussian nulls of the small world, by their density.
const nulls = Object.values(EXPLORER.worlds)[0];
const measured = name => Object.values(nulls).flatMap(arm =>
  (arm.metrics["null_" + name] || []).flatMap((value, i) => {
    const d = arm.metrics.null_density?.[i];
    return value && d ? [[d[0], value[0]]] : [];
  }));
const near = (name, share) => {
  const logit = d => Math.log(d / (1 - d));
  const close = measured(name).filter(([d]) => d > 0 && d < 1)
    .sort((a, b) => Math.abs(logit(a[0]) - logit(share)) - Math.abs(logit(b[0]) - logit(share)))
    .slice(0, 12).map(([, value]) => value);
  return close.length ? [close.reduce((a, b) => a + b) / close.length, Math.min(...close), Math.max(...close)] : null;
};

const rowsFor = at => {
  const share = ofLaws("density", at);
  const rows = [["entries that change in bf16 (%)", share.map(x => 100 * x)],
    ["of them on small weights (%)", ofLaws("low_magnitude_overlap", at).map(x => 100 * x)],
    ["Jaccard overlap of two such updates (%)", ofLaws("jaccard", at).map(x => 100 * x)]];
  for (const name of ["principal_overlap", "angle_left_mean_deg", "angle_right_mean_deg", "nss",
    "stable_rank", "hill_alpha"]) {
    const found = near(name, share[0]);
    const per = name === "principal_overlap" ? 100 : 1;
    if (found) rows.push([EXPLORER.metrics[name] + (per > 1 ? " (%)" : ""), found.map(x => per * x)]);
  }
  return rows;
};

const calculate = event => {
  const {rate, steps} = sum;
  if (event?.target === sum.density) rate.value = steps.value = "";
  const made = [];
  if (+rate.value > 0 && +steps.value >= 1) {
    sum.density.value = "";
    made.push(["steps that wander", +rate.value * Math.sqrt(+steps.value)],
      ["steps that keep a direction", +rate.value * +steps.value]);
  }
  const asked = +sum.density.value / 100;
  const columns = made.length
    ? made.map(([name, s]) => [name, rowsFor(laws.map(() => Math.log(s)))])
    : asked > 0 && asked < 1
      ? [["an update of this density", rowsFor(laws.map(law => between(density[law], logs, asked)))]] : [];
  const shown = ([mean, low, high]) => `${number(mean)} [${number(low)}, ${number(high)}]`;
  document.getElementById("calculator-table").replaceChildren(columns.length
    ? table("What an unplaced update gives: normal law or mean, and its band",
      ["diagnostic", ...columns.map(([name]) => name)],
      columns[0][1].map(([name], i) => [name, ...columns.map(([, rows]) => rows[i] ? shown(rows[i][1]) : "–")]))
    : "Type a density between 0 and 100 %, or a learning rate and steps.");
};

start();
sum.addEventListener("input", calculate);
sum.addEventListener("submit", event => event.preventDefault());
calculate();
