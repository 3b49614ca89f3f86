// Worker that ticks when the next frame is due: timers of a hidden page are throttled to one a minute.
let timer = 0;

onmessage = ({ data: rate }) => {
  clearInterval(timer);
  timer = rate ? setInterval(() => postMessage(null), 1000 / rate) : 0;
};
