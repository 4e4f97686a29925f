"use strict";
(function () {
  const $ = (selector, within) => (within || document).querySelector(selector);
  const $$ = (selector, within) => Array.from((within || document).querySelectorAll(selector));
  document.documentElement.classList.add("js");

  // tabs
  const tabs = $$("[role=tab]");
  const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
  function select(tab, focus) {
    for (const other of tabs) {
      const on = other === tab;
      other.setAttribute("aria-selected", String(on));
      other.tabIndex = on ? 0 : -1;
      panelOf(other).hidden = !on;
    }
    if (focus) tab.focus();
  }
  function remember(tab) {
    try { history.replaceState(null, "", "#" + panelOf(tab).id); } catch (error) { /* some viewers forbid it */ }
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => { select(tab); remember(tab); });
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = tabs[(steps[event.key] + tabs.length) % tabs.length];
      select(next, true);
      remember(next);
    });
  });
  function follow() {
    const target = document.getElementById(location.hash.slice(1));
    const panel = target && target.closest("[role=tabpanel]");
    if (!panel) return;
    select(tabs.find((tab) => panelOf(tab) === panel));
    if (target.classList.contains("card")) {
      target.scrollIntoView();
      target.focus({ preventScroll: true });
    }
  }
  window.addEventListener("hashchange", follow);

  // test examples: search, filter, order
  const list = $("#cards"), cards = $$(".card", list), links = $$(".index li");
  const linkOf = new Map(cards.map((card, i) => [card, links[i]]));
  const state = { words: [], filter: "all" };
  function show() {
    let shown = 0;
    for (const card of cards) {
      const fits = (state.filter === "all" || card.dataset.wrong === "yes") &&
        state.words.every((word) => card.dataset.search.includes(word));
      card.hidden = !fits;
      linkOf.get(card).hidden = !fits;
      shown += fits;
    }
    $("#nothing").hidden = shown > 0 || cards.length === 0;
    $("#found").textContent = shown === cards.length ? cards.length + " examples" : shown + " of " + cards.length + " examples";
  }
  $("#find").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  });
  const filters = $$("[data-filter]");
  function filterBy(name) {
    state.filter = name;
    for (const button of filters) button.setAttribute("aria-pressed", String(button.dataset.filter === name));
    show();
  }
  for (const button of filters) button.addEventListener("click", () => filterBy(button.dataset.filter));
  $("#reset").addEventListener("click", () => {
    $("#find").value = "";
    state.words = [];
    filterBy("all");
    $("#find").focus();
  });
  $("#order").addEventListener("change", (event) => {
    const key = event.target.value;
    const by = key === "given" ? (c) => Number(c.dataset.order) : (c) => -Number(c.dataset[key]);
    const ordered = cards.slice().sort((a, b) => by(a) - by(b) || a.dataset.order - b.dataset.order);
    const index = $(".index ol");
    for (const card of ordered) {
      list.insertBefore(card, $("#nothing"));
      index.append(linkOf.get(card));
    }
  });

  // suspicious examples: sort, filter, export
  const table = $("#suspects"), body = $("tbody", table), rows = $$("tr", body);
  const classes = $("#class"), disagree = $("#disagree");
  function listRows() {
    let shown = 0;
    for (const row of rows) {
      const fits = (!classes || !classes.value || row.dataset.label === classes.value) &&
        (!disagree || !disagree.checked || row.dataset.differs === "yes");
      row.hidden = !fits;
      shown += fits;
    }
    $("#listed").textContent = shown === rows.length ? rows.length + " examples" : shown + " of " + rows.length + " examples";
  }
  if (classes) classes.addEventListener("change", listRows);
  if (disagree) disagree.addEventListener("change", listRows);
  const headers = $$("th[aria-sort]", table);
  for (const header of headers) {
    const button = $("button", header);
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort");
      const next = now === "none" ? button.dataset.first : now === "ascending" ? "descending" : "ascending";
      for (const other of headers) other.setAttribute("aria-sort", other === header ? next : "none");
      const key = button.dataset.key;
      const value = new Map(rows.map((row) => [row, $("td[data-" + key + "]", row).dataset[key]]));
      const compare = (a, b) => {
        const x = Number(a), y = Number(b);
        return a !== "" && b !== "" && !isNaN(x) && !isNaN(y) ? x - y : a.localeCompare(b, undefined, { numeric: true });
      };
      const sign = next === "ascending" ? 1 : -1;
      rows.sort((a, b) => sign * compare(value.get(a), value.get(b)));
      body.append(...rows);
    });
  }
  $("#export").addEventListener("click", () => {
    const text = JSON.parse($("#csv").textContent);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    link.download = "suspicious.csv";
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  show();
  listRows();
  select(tabs[0]);
  follow();
})();
