// Runs before the first paint, so that the page never flashes in the wrong theme.
try {
  const theme = localStorage.getItem("moss.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage is disabled: use the system's theme.
}
