"use strict";
// The curves of a report: fills the figures that Bokeh made with the runs that are switched on. Text reaches the page as text only (textContent, canvas).
(async () => {
    const unpack = async (id) => {
        const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
        return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    };
    const make = (tag, parent, text = "", kind = "") => {
        const node = document.createElement(tag);
        node.textContent = text;
        if (kind) node.className = kind;
        parent.append(node);
        return node;
    };
    const place = document.getElementById("curves");
    try {
        const [code, text] = await Promise.all([unpack("library"), unpack("data")]);
        const script = document.createElement("script");
        script.textContent = code;
        document.head.append(script);
        const { figures, metrics, groups, runs, outcome } = JSON.parse(text);
        await Bokeh.embed.embed_item(figures, "curves");
        const model = (name) => Bokeh.documents.at(-1).get_model_by_name(name);

        const several = groups.some((g) => g.size > 1);
        const view = { clock: "steps", runs: !several || runs.length <= 30, means: several };
        const shown = runs.map(() => true);
        const members = groups.map(() => []);
        runs.forEach((run, r) => members[run.group].push(r));

        const draw = () => {
            const visible = members.filter((of) => of.length > 1 && of.some((r) => shown[r])).length;
            metrics.forEach((metric, m) => {
                const lines = { xs: [], ys: [], color: [], alpha: [], width: [], name: [] };
                for (const [r, steps, seconds, values] of metric.runs) {
                    const group = groups[runs[r].group];
                    const alone = group.size === 1;
                    if (!shown[r] || !(view.runs || (alone && view.means))) continue;
                    lines.xs.push(view.clock === "steps" ? steps : seconds);
                    lines.ys.push(values);
                    lines.color.push(group.color);
                    lines.alpha.push(view.means && !alone ? 0.3 : runs.length > 100 ? 0.5 : 0.9);
                    lines.width.push(view.means && !alone ? 0.8 : 1.4);
                    lines.name.push(runs[r].name);
                }
                const means = { xs: [], ys: [], color: [], name: [] };
                const bands = { xs: [], ys: [], color: [] };
                for (const [g, curves] of view.means ? metric.means : []) {
                    const curve = curves[view.clock];
                    if (!curve || !members[g].some((r) => shown[r])) continue;
                    const [x, mean, low, high] = curve;
                    means.xs.push(x);
                    means.ys.push(mean);
                    means.color.push(groups[g].color);
                    means.name.push(`${groups[g].name}, mean of ${groups[g].size} seeds`);
                    if (visible > 30) continue; // so many bands cover each other
                    bands.xs.push([...x, ...x.toReversed()]);
                    bands.ys.push([...low, ...high.toReversed()]);
                    bands.color.push(groups[g].color);
                }
                model(`runs${m}`).data = lines;
                model(`means${m}`).data = means;
                model(`bands${m}`).data = bands;
                model(`x${m}`).axis_label = view.clock;
            });
        };

        draw();
        const frame = () => new Promise((next) => requestAnimationFrame(next));
        await frame(); // Bokeh draws in this one
        await frame();
        document.documentElement.dataset.drawn = Math.round(performance.now());

        // Switches: the clock, what is drawn, and each run.
        const controls = document.getElementById("controls");
        const option = (kind, name, label, on, change) => {
            const wrap = make("label", controls);
            const input = document.createElement("input");
            Object.assign(input, { type: kind, name, checked: on });
            input.addEventListener("change", () => { change(input.checked); draw(); });
            wrap.append(input, ` ${label}`);
            return input;
        };
        option("radio", "clock", "over steps", true, () => { view.clock = "steps"; });
        option("radio", "clock", "over seconds", false, () => { view.clock = "seconds"; });
        if (several) {
            option("checkbox", "means", "mean and 95 % interval", view.means, (on) => { view.means = on; });
            option("checkbox", "runs", "single runs", view.runs, (on) => { view.runs = on; });
        }
        const boxes = [];
        const heads = [];
        const sync = () => {
            boxes.forEach((box, r) => { box.checked = shown[r]; });
            heads.forEach((head, g) => {
                head.checked = members[g].some((r) => shown[r]);
                head.indeterminate = head.checked && !members[g].every((r) => shown[r]);
            });
            draw();
        };
        if (runs.length > 1) {
            for (const [label, on] of [["all", true], ["none", false]]) {
                make("button", controls, label).addEventListener("click", () => { shown.fill(on); sync(); });
            }
            const table = make("table", document.getElementById("runs"));
            const top = make("tr", table);
            for (const [title, kind] of [["run", ""], ["seed", "number"], [outcome, "number"], ["state", ""], ["steps", "number"], ["seconds", "number"]]) {
                make("th", top, title, kind);
            }
            const box = (cell, change) => {
                const wrap = make("label", cell);
                const input = document.createElement("input");
                input.type = "checkbox";
                input.checked = true;
                input.addEventListener("change", () => { change(input.checked); sync(); });
                wrap.append(input);
                return [input, wrap];
            };
            groups.forEach((group, g) => {
                if (several) {
                    const cell = make("td", make("tr", table, "", "group"));
                    cell.colSpan = 6;
                    const [input, wrap] = box(cell, (on) => { members[g].forEach((r) => { shown[r] = on; }); });
                    make("span", wrap, "", "swatch").style.background = group.color;
                    wrap.append(group.name);
                    heads[g] = input;
                }
                for (const r of members[g]) {
                    const run = runs[r];
                    const row = make("tr", table, "", several ? "run" : "");
                    const [input, wrap] = box(make("td", row), (on) => { shown[r] = on; });
                    if (!several) make("span", wrap, "", "swatch").style.background = group.color;
                    wrap.append(several || group.name === run.name ? ` ${run.name}` : `${group.name} (${run.name})`);
                    boxes[r] = input;
                    make("td", row, run.seed, "number");
                    make("td", row, run.outcome, "number");
                    make("td", row, run.status);
                    make("td", row, run.steps, "number");
                    make("td", row, run.seconds, "number");
                }
            });
        } else {
            document.getElementById("runs").remove();
        }
        document.documentElement.dataset.ready = "yes";
    } catch (error) {
        place.textContent = `The curves could not be drawn in this browser (${error}); it must be of 2023 or later. All tables stand below.`;
        document.documentElement.dataset.failed = String(error);
    }
})();
