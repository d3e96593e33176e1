// Makes an element: properties, ARIA attributes (`aria: {label}`; `role` too), children. Text is never parsed.
window.make = function make(tag, properties = {}, ...children) {
  const { aria, ...own } = properties;
  const node = Object.assign(document.createElement(tag), own);
  for (const [name, value] of Object.entries(aria ?? {})) node.setAttribute(name === "role" ? name : `aria-${name}`, value);
  node.append(...children.filter((child) => child !== null));
  return node;
};
