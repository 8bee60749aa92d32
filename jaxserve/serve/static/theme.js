// Sets the colours before the page is painted; loaded first, and no module, so that nothing flashes.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("jaxserve.theme");
  } catch {
    // storage is off: the system decides
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
