'use strict';
// Makes the controls of the report work. Without it the page shows all cases, one below the other.
// At once, not when the page is there: so the cases are never all laid out.
document.documentElement.classList.add('js');

document.addEventListener('DOMContentLoaded', () => {
  const get = id => document.getElementById(id);
  const list = get('rows'), stage = get('stage'), keys = get('keys');
  if (!list) return; // no image was scored
  const beside = matchMedia('(min-width: 56.01rem)'); // the list stands beside the picture, see page.css
  const collator = new Intl.Collator(undefined, { numeric: true });

  // One record for every line of the list; lines without a picture share one view.
  const rows = [...list.children].map((line, rank) => {
    const link = line.firstElementChild;
    return {
      line, link, rank, view: get(link.getAttribute('href').slice(1)),
      name: link.querySelector('.who b').textContent, path: line.dataset.name.toLowerCase(), label: line.dataset.label,
      p: line.dataset.p ? Number(line.dataset.p) : Infinity,
    };
  });
  const orders = {
    score: (a, b) => a.rank - b.rank,
    name: (a, b) => collator.compare(a.name, b.name) || a.rank - b.rank,
    p: (a, b) => (a.p === b.p ? a.rank - b.rank : a.p - b.p),
  };
  let order = rows, visible = rows, current = null, strength = 75;

  // ---- the case that is shown

  function show(row) {
    if (current) {
      current.view.classList.remove('on');
      current.link.removeAttribute('aria-current');
      current.link.tabIndex = -1;
    }
    current = row;
    get('previous').disabled = !row || row === visible[0];
    get('next').disabled = !row || row === visible[visible.length - 1];
    if (!row) return;
    row.view.classList.add('on');
    row.link.setAttribute('aria-current', 'true');
    row.link.tabIndex = 0; // the list is one stop of the tab key
    if (row.view.id === 'listed') fillPictureless(row);
    const top = row.line.offsetTop; // in the list
    if (top < list.scrollTop) list.scrollTop = top;
    const below = top + row.line.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
    if (stage.classList.contains('zoomed')) centre();
  }

  function fillPictureless(row) {
    row.view.querySelector('h3').textContent = row.name;
    row.view.querySelectorAll('header > :not(.name)').forEach(old => old.remove());
    const copies = ['.rank', '.value'].map(part => row.link.querySelector(part).cloneNode(true));
    row.view.querySelector('header').prepend(copies[0]);
    row.view.querySelector('header').append(copies[1]);
  }

  // What a person chose by hand: tell a screen reader, keep the focus with the choice, and have the case in sight.
  function choose(row) {
    if (!row) return;
    const inList = list.contains(document.activeElement);
    show(row);
    if (inList) row.link.focus({ preventScroll: true });
    else get('told').textContent = `Case ${visible.indexOf(row) + 1} of ${visible.length}: ${row.name}`;
    const { top, bottom } = (row.view.querySelector('.view') || row.view).getBoundingClientRect();
    const hidden = beside.matches && row.line.getBoundingClientRect().bottom > innerHeight;
    if (top < 0 || bottom > innerHeight || hidden) stage.scrollIntoView();
  }

  const step = by => choose(visible[visible.indexOf(current) + by]);
  const shownRows = () => order.filter(row => !row.line.hidden);

  // ---- find and sort

  function filter() {
    const part = get('part').value.toLowerCase(), label = get('label').value;
    for (const row of rows) {
      row.line.hidden = !(row.path.includes(part) && (!label || row.label === label));
      if (row.view.id !== 'listed') row.view.hidden = row.line.hidden;
    }
    visible = shownRows();
    get('found').textContent = `${visible.length} of ${rows.length} shown`;
    show(visible.includes(current) ? current : visible[0]);
  }

  function sort() {
    order = [...rows].sort(orders[get('sort').value]);
    const focused = document.activeElement;
    list.append(...order.map(row => row.line));
    if (list.contains(focused)) focused.focus({ preventScroll: true }); // a line that moves loses it
    visible = shownRows();
    show(visible.includes(current) ? current : visible[0]);
  }

  function nextOrder() {
    const choices = [...get('sort').options].filter(option => !option.disabled).map(option => option.value);
    get('sort').value = choices[(choices.indexOf(get('sort').value) + 1) % choices.length];
    get('told').textContent = `Sorted by ${get('sort').selectedOptions[0].text}`;
    sort();
  }

  // ---- overlay, contours, zoom: the same for all cases, and set for the stage alone, which keeps them quick

  function paint() {
    strength = Number(get('strength').value);
    stage.style.setProperty('--strength', get('overlay').checked ? strength / 100 : 0);
    get('percent').textContent = `${strength}%`;
    stage.classList.toggle('no-contours', !get('contours').checked);
  }

  function toggle(id) {
    get(id).checked = !get(id).checked;
    paint();
  }

  function strengthen(by) {
    get('overlay').checked = true;
    get('strength').value = strength + by;
    paint();
  }

  // The point, in percent of the picture, that the middle of the window on it shall show: at first the highest spot.
  function centre(point) {
    const view = current && current.view.querySelector('.view');
    if (!view) return;
    const [x, y] = point || view.dataset.peak.split(' ').map(Number);
    view.scrollLeft = (x / 100) * view.scrollWidth - view.clientWidth / 2;
    view.scrollTop = (y / 100) * view.scrollHeight - view.clientHeight / 2;
  }

  function zoom(point) {
    const on = stage.classList.toggle('zoomed');
    get('zoom').setAttribute('aria-pressed', on);
    if (on) centre(point);
  }

  // ---- wiring

  list.addEventListener('click', event => {
    const line = event.target.closest('li');
    if (!line || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    choose(rows.find(row => row.line === line));
  });
  stage.addEventListener('click', event => {
    const stack = event.target.closest('.stack');
    if (!stack) return;
    const box = stack.getBoundingClientRect();
    zoom([(100 * (event.clientX - box.left)) / box.width, (100 * (event.clientY - box.top)) / box.height]);
  });
  get('find').addEventListener('input', event => (event.target.id === 'sort' ? sort() : filter()));
  get('look').addEventListener('input', event => {
    if (event.target.id === 'strength') get('overlay').checked = true;
    paint();
  });
  for (const form of [get('find'), get('look')]) form.addEventListener('submit', event => event.preventDefault());
  get('previous').addEventListener('click', () => step(-1));
  get('next').addEventListener('click', () => step(1));
  get('zoom').addEventListener('click', () => zoom());
  get('help').addEventListener('click', () => keys.showModal());
  get('close').addEventListener('click', () => keys.close());
  addEventListener('beforeprint', () => stage.append(...order.map(row => row.view))); // paper has the order of the list
  addEventListener('hashchange', () => show(rows.find(row => `#${row.view.id}` === location.hash) || current));

  const actions = {
    j: () => step(1), k: () => step(-1), o: () => toggle('overlay'), c: () => toggle('contours'), z: () => zoom(),
    s: nextOrder, '+': () => strengthen(10), '-': () => strengthen(-10), '/': () => get('part').focus(),
    '?': () => keys.showModal(),
  };
  const arrows = { ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
  const inList = {
    ArrowUp: () => step(-1), ArrowDown: () => step(1), Home: () => choose(visible[0]),
    End: () => choose(visible[visible.length - 1]),
  };
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (keys.open) {
      if (key === '?') { event.preventDefault(); keys.close(); }
      return; // Escape closes it by itself
    }
    if (at.matches('input[type=search], select')) { // what is typed there is meant for it
      if (key === 'Escape') at.blur();
      return;
    }
    const zoomed = at.matches('.view') && stage.classList.contains('zoomed');
    const ownArrows = zoomed || at.matches('input[type=range], .scroll');
    const act = (get('letters').checked && Object.hasOwn(actions, key) && actions[key])
      || (!ownArrows && arrows[key]) || (list.contains(at) && inList[key]);
    if (!act) return;
    event.preventDefault();
    act();
  });

  // ---- the start

  for (const row of rows) row.link.tabIndex = -1;
  for (const view of document.querySelectorAll('.view')) {
    view.tabIndex = 0;
    view.setAttribute('role', 'group');
    view.setAttribute('aria-label', 'Picture; when zoomed, arrow keys move it');
  }
  if (!rows.some(row => row.p < Infinity)) get('sort').querySelector('[value=p]').disabled = true;
  if (rows.every(row => row.label === 'no label')) get('label').parentElement.hidden = true;
  get('look').hidden = false;
  get('find').hidden = rows.length < 2;
  get('previous').parentElement.hidden = rows.length < 2;
  paint(); // a browser may have kept the controls as they were before it loaded the page anew
  if (get('sort').value !== 'score') sort();
  filter();
  const linked = rows.find(row => `#${row.view.id}` === location.hash);
  if (linked) show(linked);
});
