"use strict";
// The reader's choice goes before the system's; where it cannot be stored, it holds for this view.
(() => {
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("prefloop-theme"); } catch { return null; } };
  const store = (theme) => { try { localStorage.setItem("prefloop-theme", theme); } catch { /* a file without storage */ } };
  const order = ["auto", "light", "dark"];
  const apply = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  };
  let theme = order.includes(stored()) ? stored() : "auto";
  apply(theme);
  document.addEventListener("DOMContentLoaded", () => {
    apply(theme);
    document.getElementById("theme").addEventListener("click", () => {
      theme = order[(order.indexOf(theme) + 1) % order.length];
      store(theme);
      apply(theme);
    });
  });
})();
