// Boxes on a picture, by pointer and keyboard. The value is JSON text:
//   {"mode": "mark" | "place", "aspect": width / height, "boxes": [{"label", "color", "box": [x0, y0, x1, y1]}],
//    "points": [[x, y]], "added": what the last action added, or null}
// `image` is the picture's address. Python hears "input" after each whole action, never in the middle of one.
const STEP = 0.01, SMALLEST = 0.02, CLICK = 5;
let state = null, drag = null, selected = 0;

function read() {
  try { state = JSON.parse(props.value); } catch (error) { state = null; }
  if (!state) state = { mode: 'place', aspect: 1, boxes: [], points: [] };
}

function tell(added) {
  state.added = added || null;
  props.value = JSON.stringify(state);
  draw();
  trigger('input');
}

function place(node, box) {
  const [x0, y0, x1, y1] = box;
  Object.assign(node.style, { left: 100 * x0 + '%', top: 100 * y0 + '%', width: 100 * (x1 - x0) + '%', height: 100 * (y1 - y0) + '%' });
}

function spoken(each) {
  const [x0, y0, x1, y1] = each.box.map(v => Math.round(100 * v));
  return `${each.label}: left ${x0}, top ${y0}, right ${x1}, bottom ${y1} percent`;
}

function make(kind, className, parent) {
  const node = document.createElement(kind);
  node.className = className;
  parent.appendChild(node);
  return node;
}

function draw() {
  const root = element.querySelector('.mifo-canvas');
  if (!root) return;
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.index : undefined;
  root.replaceChildren();
  const stage = make('div', 'mifo-stage' + (state.mode === 'mark' ? ' marking' : ''), root);
  stage.style.aspectRatio = state.aspect;
  if (props.image) stage.style.backgroundImage = `url("${props.image}")`;
  stage.addEventListener('pointerdown', begin);
  state.boxes.forEach((each, index) => {
    const node = make('div', 'mifo-box', stage);
    node.tabIndex = 0;
    node.dataset.index = index;
    node.style.borderColor = each.color;
    node.setAttribute('role', 'group');
    node.setAttribute('aria-label', spoken(each));
    place(node, each.box);
    const label = make('span', 'mifo-label', node);
    label.textContent = each.label;
    label.style.background = each.color;
    node.addEventListener('keydown', event => key(event, index));
    node.addEventListener('focus', () => { selected = index; });
    if (state.mode === 'place') {
      [[0, 0], [1, 0], [0, 1], [1, 1]].forEach(([right, bottom]) => {
        const grip = make('span', 'mifo-grip', node);
        Object.assign(grip.style, { left: 100 * right + '%', top: 100 * bottom + '%', background: each.color,
                                    cursor: right === bottom ? 'nwse-resize' : 'nesw-resize' });
        grip.dataset.corner = `${right}${bottom}`;
      });
    }
  });
  (state.points || []).forEach(([x, y]) => {
    const node = make('span', 'mifo-point', stage);
    Object.assign(node.style, { left: 100 * x + '%', top: 100 * y + '%', background: '#111' });
  });
  const bar = make('div', 'mifo-bar', root);
  const button = (text, action) => {
    const node = make('button', '', bar);
    node.type = 'button';
    node.textContent = text;
    node.addEventListener('click', action);
  };
  if (state.mode === 'mark') {
    button('Add a box in the middle', () => tell({ box: [0.3, 0.3, 0.7, 0.7] }));
  } else if (state.boxes.length > 1) {
    button('Swap two boxes', () => {
      const other = (selected + 1) % state.boxes.length, first = state.boxes[selected % state.boxes.length];
      [first.box, state.boxes[other].box] = [state.boxes[other].box, first.box];
      tell();
    });
    button('Make all as large as this', () => {
      const [x0, y0, x1, y1] = state.boxes[selected % state.boxes.length].box;
      state.boxes.forEach(each => { each.box = kept([each.box[0], each.box[1], each.box[0] + x1 - x0, each.box[1] + y1 - y0]); });
      tell();
    });
  }
  make('p', 'mifo-hint', root).textContent = state.mode === 'mark'
    ? 'Click on a thing, or drag a box around it. Keys on a box: Delete takes the thing away.'
    : 'Drag a box, or a corner of it. Keys on a box: arrows move it, Shift and arrows resize it.';
  if (focused !== undefined && drag === null) {
    const again = root.querySelector(`[data-index="${focused}"]`);
    if (again) again.focus({ preventScroll: true });
  }
}

function kept([x0, y0, x1, y1]) { // the same size, moved inside the picture
  const width = Math.min(1, x1 - x0), height = Math.min(1, y1 - y0);
  const left = Math.min(Math.max(0, x0), 1 - width), top = Math.min(Math.max(0, y0), 1 - height);
  return [left, top, left + width, top + height];
}

function sized(box, right, bottom, x, y) { // one corner goes to (x, y)
  const [x0, y0, x1, y1] = box, within = v => Math.min(1, Math.max(0, v));
  return [right ? x0 : Math.min(within(x), x1 - SMALLEST), bottom ? y0 : Math.min(within(y), y1 - SMALLEST),
          right ? Math.max(within(x), x0 + SMALLEST) : x1, bottom ? Math.max(within(y), y0 + SMALLEST) : y1];
}

function key(event, index) {
  const each = state.boxes[index];
  if (state.mode === 'mark') {
    if (event.key !== 'Delete' && event.key !== 'Backspace') return;
    event.preventDefault();
    tell({ removed: index });
    return;
  }
  const moves = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const [dx, dy] = moves[event.key], [x0, y0, x1, y1] = each.box;
  each.box = event.shiftKey ? sized(each.box, 1, 1, x1 + dx, y1 + dy) : kept([x0 + dx, y0 + dy, x1 + dx, y1 + dy]);
  tell();
}

function begin(event) {
  if (event.button !== 0) return;
  const stage = event.currentTarget, area = stage.getBoundingClientRect();
  const at = e => [Math.min(1, Math.max(0, (e.clientX - area.left) / area.width)),
                   Math.min(1, Math.max(0, (e.clientY - area.top) / area.height))];
  const node = event.target.closest('.mifo-box'), from = at(event);
  const index = node ? Number(node.dataset.index) : -1, marking = state.mode === 'mark';
  if (!marking && index < 0) return;
  event.preventDefault();
  if (node && !marking) node.focus({ preventScroll: true });
  const corner = event.target.dataset.corner, start = marking ? null : state.boxes[index].box.slice();
  const rubber = marking ? make('div', 'mifo-box', stage) : null;
  if (rubber) { rubber.style.borderColor = '#111'; rubber.style.display = 'none'; }
  const far = e => Math.hypot(e.clientX - event.clientX, e.clientY - event.clientY) > CLICK;
  drag = { moved: false };
  const move = e => {
    const [x, y] = at(e);
    if (!drag.moved && !far(e)) return;
    drag.moved = true;
    if (marking) {
      rubber.style.display = '';
      place(rubber, [Math.min(from[0], x), Math.min(from[1], y), Math.max(from[0], x), Math.max(from[1], y)]);
      return;
    }
    const dx = x - from[0], dy = y - from[1], [x0, y0, x1, y1] = start;
    state.boxes[index].box = corner
      ? sized(start, Number(corner[0]), Number(corner[1]), (Number(corner[0]) ? x1 : x0) + dx, (Number(corner[1]) ? y1 : y0) + dy)
      : kept([x0 + dx, y0 + dy, x1 + dx, y1 + dy]);
    place(node, state.boxes[index].box);
  };
  const end = e => {
    window.removeEventListener('pointermove', move);
    window.removeEventListener('pointerup', end);
    window.removeEventListener('pointercancel', end);
    const moved = drag.moved, [x, y] = at(e);
    drag = null;
    if (rubber) rubber.remove();
    if (e.type === 'pointercancel') { draw(); return; }
    if (!marking) { if (moved) tell(); return; }
    const box = [Math.min(from[0], x), Math.min(from[1], y), Math.max(from[0], x), Math.max(from[1], y)];
    if (!moved) tell({ point: from });
    else if (box[2] - box[0] >= SMALLEST && box[3] - box[1] >= SMALLEST) tell({ box });
  };
  window.addEventListener('pointermove', move);
  window.addEventListener('pointerup', end);
  window.addEventListener('pointercancel', end);
}

read();
draw();
watch(['value', 'image'], () => { read(); if (drag === null) draw(); });
