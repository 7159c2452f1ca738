// The table of edits: filter, sort, details. Texts only ever become text nodes. The state lives in the address
// ("#status=rejected&sort=-after&q=Paris"), so that a view can be linked to.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEP = 200;
  const per = (x) => (x === null || x === undefined ? "" : (100 * x).toFixed(1).replace(/^-0\.0$/, "0.0"));
  const COLUMNS = [
    { key: "index", name: "#", of: (r) => r.index, css: "number" },
    { key: "prompt", name: "Fact", of: (r) => r.prompt || r.why, css: "prompt" },
    { key: "answer", name: "True → new", of: (r) => r.new, css: "answer" },
    { key: "status", name: "Status", of: (r) => r.status + (r.lost ? " lost" : "") },
    { key: "before", name: "before, %", title: "Probability of the new answer before the edit", of: (r) => r.before },
    { key: "after", name: "after, %", title: "Probability of the new answer right after the edit", of: (r) => r.after },
    { key: "final", name: "final, %", title: "Probability of the new answer on the final model", of: (r) => r.final },
    ...data.scores.map((name) => ({ key: name, name: `${name}, %`, title: data.meanings[name], of: (r) => r.now[name] })),
  ].filter((column) => !column.title || data.records.some((r) => column.of(r) !== null && column.of(r) !== undefined));
  const cssOf = (column) => column.css || (column.title ? "number" : "");
  const state = { q: "", status: "", sort: "index", shown: STEP };

  const make = (tag, css, text) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (text !== undefined && text !== null) node.textContent = text;
    return node;
  };
  const haystack = (r) =>
    [r.id, r.prompt, r.subject, r.true, r.new, r.relation, r.why, ...(r.notes || [])].join("\n").toLowerCase();
  const texts = data.records.map(haystack);

  const toolbar = document.getElementById("tools");
  const table = document.querySelector("#rows table");
  const body = table.createTBody();
  const found = document.getElementById("found");
  const more = document.getElementById("more");
  const search = make("input");
  search.type = "search";
  search.placeholder = "Filter by text, relation or reason";
  search.setAttribute("aria-label", "Filter by text");
  const status = make("select");
  status.setAttribute("aria-label", "Filter by status");
  const order = make("select", "only-narrow");
  order.setAttribute("aria-label", "Sort by");

  const option = (select, value, text) => {
    const node = make("option", "", text);
    node.value = value;
    select.append(node);
  };
  option(status, "", `all (${data.records.length})`);
  for (const name of [...new Set(data.records.map((r) => r.status))]) {
    option(status, name, `${name.replace("_", " ")} (${data.records.filter((r) => r.status === name).length})`);
  }
  const lost = data.records.filter((r) => r.lost).length;
  if (lost) option(status, "lost", `lost since (${lost})`);
  for (const column of COLUMNS) {
    option(order, column.key, `by ${column.name}`);
    option(order, "-" + column.key, `by ${column.name}, falling`);
  }
  toolbar.append(search, status, order, found);

  const head = table.createTHead().insertRow();
  for (const column of COLUMNS) {
    const cell = make("th", cssOf(column));
    cell.scope = "col";
    const button = make("button", "", column.name);
    button.type = "button";
    if (column.title) button.title = column.title;
    button.addEventListener("click", () => {
      state.sort = state.sort === column.key ? "-" + column.key : column.key;
      update();
    });
    cell.append(button);
    head.append(cell);
  }

  const compare = (column, falling) => (a, b) => {
    const [x, y] = [column.of(data.records[a]), column.of(data.records[b])];
    const [noX, noY] = [x === null || x === undefined, y === null || y === undefined];
    if (noX || noY) return noX && noY ? a - b : noX ? 1 : -1; // what is not known stands last either way
    const by = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return (falling ? -by : by) || a - b;
  };

  const cellOf = (column, r, row) => {
    const cell = make("td", cssOf(column));
    const value = column.of(r);
    if (column.key === "index") {
      const button = make("button", "open", `▸ ${value === null ? "–" : value}`);
      button.type = "button";
      button.title = "Details";
      button.setAttribute("aria-expanded", "false");
      button.addEventListener("click", () => toggle(button, r, row));
      cell.append(button);
    } else if (column.key === "prompt") {
      cell.dir = "auto";
      if (r.prompt) {
        const [start, end] = r.span;
        cell.append(r.prompt.slice(0, start), make("strong", "", r.prompt.slice(start, end)), r.prompt.slice(end));
      }
      if (r.why) cell.append(make("span", "why", r.why));
    } else if (column.key === "answer") {
      cell.dir = "auto";
      if (r.new) cell.append(r.true === null ? "? → " : `${r.true} → `, make("strong", "", r.new));
    } else if (column.key === "status") {
      cell.append(make("span", `status ${r.status}`, r.status.replace("_", " ")));
      if (r.lost) cell.append(" ", make("span", "status lost", "lost"));
    } else {
      cell.dataset.label = column.name;
      cell.textContent = per(value);
    }
    return cell;
  };

  const toggle = (button, r, row) => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    button.textContent = (open ? "▸" : "▾") + button.textContent.slice(1);
    if (open) row.nextSibling.remove();
    else row.after(details(r));
  };
  const details = (r) => {
    const row = make("tr", "detail");
    const cell = row.insertCell();
    cell.colSpan = COLUMNS.length;
    const list = make("dl");
    for (const [name, value] of Object.entries(r.more)) {
      if (value === null || value === "" || (Array.isArray(value) && !value.length)) continue;
      list.append(make("dt", "", name), make("dd", "", Array.isArray(value) ? value.join("; ") : String(value)));
    }
    cell.append(list);
    const stages = Object.keys(r.values);
    const names = [...new Set(stages.flatMap((stage) => Object.keys(r.values[stage])))];
    if (names.length) {
      const inner = make("table");
      const top = inner.createTHead().insertRow();
      for (const name of ["score, %", ...stages.map((stage) => data.stages[stage])]) top.append(make("th", "number", name));
      const rows = inner.createTBody();
      for (const name of names) {
        const line = rows.insertRow();
        line.append(make("td", "number", name));
        for (const stage of stages) line.append(make("td", "number", per(r.values[stage][name])));
      }
      cell.append(inner);
    }
    return row;
  };

  const matching = () => {
    const words = state.q.toLowerCase();
    return data.records
      .map((_, place) => place)
      .filter((place) => {
        const r = data.records[place];
        const right = !state.status || (state.status === "lost" ? r.lost : r.status === state.status);
        return right && (!words || texts[place].includes(words));
      });
  };
  const update = (remember = true) => {
    const falling = state.sort.startsWith("-");
    const column = COLUMNS.find((c) => c.key === state.sort.replace(/^-/, "")) || COLUMNS[0];
    const places = matching().sort(compare(column, falling));
    [...head.cells].forEach((cell, place) => {
      if (COLUMNS[place] === column) cell.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const fragment = document.createDocumentFragment();
    for (const place of places.slice(0, state.shown)) {
      const row = make("tr");
      row.dataset.id = data.records[place].id;
      for (const c of COLUMNS) row.append(cellOf(c, data.records[place], row));
      fragment.append(row);
    }
    body.replaceChildren(fragment);
    const shown = Math.min(places.length, state.shown);
    found.textContent = `${places.length} of ${data.records.length}` + (shown < places.length ? `, the first ${shown} shown` : "");
    more.hidden = shown >= places.length;
    search.value = state.q;
    status.value = state.status;
    order.value = state.sort;
    if (remember) {
      const view = new URLSearchParams();
      if (state.q) view.set("q", state.q);
      if (state.status) view.set("status", state.status);
      if (state.sort !== "index") view.set("sort", state.sort);
      try {
        history.replaceState(null, "", "#" + (view.toString() || "edits"));
      } catch (error) {
        // some browsers keep the address of a local file as it is
      }
    }
  };
  const fromAddress = () => {
    const view = new URLSearchParams(location.hash.slice(1));
    const known = ["q", "status", "sort"].filter((name) => view.get(name));
    if (known.length) {
      Object.assign(state, { q: "", status: "", sort: "index", shown: STEP });
      for (const name of known) state[name] = view.get(name);
    }
    update(false);
    if (known.length) document.getElementById("edits").scrollIntoView();
  };

  search.addEventListener("input", () => { state.q = search.value; state.shown = STEP; update(); });
  status.addEventListener("change", () => { state.status = status.value; state.shown = STEP; update(); });
  order.addEventListener("change", () => { state.sort = order.value; update(); });
  more.addEventListener("click", () => { state.shown += STEP; update(); });
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
