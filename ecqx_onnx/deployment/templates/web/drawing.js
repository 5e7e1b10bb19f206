// A pad to draw on, with mouse, pen, finger or keyboard: white strokes on a black canvas.

const STEP = 10; // pixels of the canvas an arrow key moves; with Shift a fifth of it
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Makes a canvas one to draw on. drawn() is told after each stroke, cleared() after it was emptied. */
export class Pad {
  constructor(canvas, cursor, { drawn, cleared }) {
    Object.assign(this, { canvas, cursor, drawn, cleared });
    this.pen = canvas.getContext('2d', { willReadFrequently: true });
    Object.assign(this.pen, { strokeStyle: '#fff', lineWidth: 22, lineCap: 'round', lineJoin: 'round' });
    this.at = [canvas.width / 2, canvas.height / 2];
    this.down = false;
    this.wipe();
    this.listen();
  }

  wipe() {
    this.pen.fillStyle = '#000';
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  clear() {
    this.wipe();
    this.lift();
    this.cleared();
  }

  lineTo(to) {
    this.pen.beginPath();
    this.pen.moveTo(...this.at);
    this.pen.lineTo(...to);
    this.pen.stroke();
    this.at = to;
  }

  lift() {
    this.down = false;
    this.cursor.classList.remove('down');
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener('pointerdown', (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.down = true;
      this.at = this.place(event);
      this.lineTo(this.at);
    });
    canvas.addEventListener('pointermove', (event) => {
      if (this.down && canvas.hasPointerCapture(event.pointerId)) this.lineTo(this.place(event));
    });
    const end = () => {
      if (!this.down) return;
      this.lift();
      this.drawn();
    };
    canvas.addEventListener('pointerup', end);
    canvas.addEventListener('pointercancel', end);
    canvas.addEventListener('keydown', (event) => this.press(event));
    canvas.addEventListener('focus', () => this.showCursor());
    canvas.addEventListener('blur', end);
  }

  place({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((clientX - box.left) * this.canvas.width) / box.width;
    const y = ((clientY - box.top) * this.canvas.height) / box.height;
    return [x, y];
  }

  press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const arrow = ARROWS[event.key];
    if (arrow) this.move(arrow, event.shiftKey ? STEP / 5 : STEP);
    else if (event.key === ' ') this.toggle();
    else if (event.key === 'Enter') this.drawn();
    else if (event.key === 'Delete' || event.key === 'Backspace') this.clear();
    else return;
    event.preventDefault(); // the page does not scroll
    this.showCursor();
  }

  move([x, y], step) {
    const clip = (value, most) => Math.min(most, Math.max(0, value));
    const to = [clip(this.at[0] + x * step, this.canvas.width), clip(this.at[1] + y * step, this.canvas.height)];
    if (this.down) this.lineTo(to);
    else this.at = to;
  }

  toggle() {
    if (this.down) {
      this.lift();
      this.drawn();
      return;
    }
    this.down = true;
    this.cursor.classList.add('down');
    this.lineTo(this.at);
  }

  showCursor() {
    this.cursor.style.left = `${(100 * this.at[0]) / this.canvas.width}%`;
    this.cursor.style.top = `${(100 * this.at[1]) / this.canvas.height}%`;
  }
}
