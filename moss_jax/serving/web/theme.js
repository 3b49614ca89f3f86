// Runs before the page is drawn, so that it never flashes in the other theme.
try {
  const theme = localStorage.getItem("moss.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage is off: the system's theme it is.
}
