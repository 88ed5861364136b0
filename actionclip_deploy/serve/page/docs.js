// The description of the API, drawn by Swagger UI, which comes from this server as well.

SwaggerUIBundle({
  dom_id: "#docs",
  url: "openapi.json",
  deepLinking: true,
  // Else it would have the document checked by a server of its makers.
  validatorUrl: null,
});
