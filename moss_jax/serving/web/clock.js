// A worker that says when the next frame is due: timers of a page that is hidden go once a minute.
let timer = 0;

onmessage = ({ data: rate }) => {
  clearInterval(timer);
  timer = rate ? setInterval(() => postMessage(null), 1000 / rate) : 0;
};
